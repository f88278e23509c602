"""Decode the passages of this folder with transformers, greedily.

    pip install transformers torch
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import sys
from pathlib import Path
from typing import Any

from passages import decode
from safetensors.torch import load_file
from transformers_model import loaded_model

model, device = loaded_model()


def after(path: Path, passage: dict[str, Any]) -> list[int]:
    """The new tokens after the inputs (1, N, D) of a passage."""
    inputs = load_file(path)["inputs_embeds"].to(device)
    new = model.generate(
        inputs_embeds=inputs, max_new_tokens=passage["new_tokens"], do_sample=False
    )
    ids: list[int] = new[0].tolist()
    return ids


if __name__ == "__main__":
    sys.exit(decode(after))
