"""Decode the passages of this folder with PEFT, greedily: each is a prompt-tuning adapter.

    pip install peft transformers torch
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from passages import decode
from peft import PeftModel
from transformers_model import loaded_model

model, device = loaded_model()


def after(path: Path, passage: dict[str, Any]) -> list[int]:
    """The new tokens after the adapter of a passage and the tokens that it is given."""
    given = torch.tensor(
        [passage["given"]], dtype=torch.long, device=device
    )  # (1, 0) where nothing is given
    adapted: Any = PeftModel.from_pretrained(model, path)
    new = adapted.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=passage["new_tokens"],
        do_sample=False,
        use_cache=False,  # PEFT 0.21 does not know the cache of transformers 5.24 by its new name
    )
    ids: list[int] = new[0, given.shape[1] :].tolist()
    return ids


if __name__ == "__main__":
    sys.exit(decode(after))
