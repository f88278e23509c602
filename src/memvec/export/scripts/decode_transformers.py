"""Decode the passages of this folder with transformers, greedily.

    pip install transformers torch
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from passages import MANIFEST, decode, model_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

# As the export was certified: another device or attention rounds otherwise.
certified = MANIFEST["certificate"]
options: dict[str, Any] = {"dtype": getattr(torch, MANIFEST["dtype"])}
if certified["attention"] in ("eager", "sdpa"):
    options["attn_implementation"] = certified["attention"]
device = certified["device"] if torch.cuda.is_available() else "cpu"
model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), **options).to(device)
# The model's own may sample, penalise or stop early.
model.generation_config = GenerationConfig(pad_token_id=0)


def behind(path: Path, passage: dict[str, Any]) -> list[int]:
    """The new tokens behind the inputs (1, N, D) of a passage."""
    inputs = load_file(path)["inputs_embeds"].to(device)
    new = model.generate(
        inputs_embeds=inputs, max_new_tokens=passage["new_tokens"], do_sample=False
    )
    ids: list[int] = new[0].tolist()
    return ids


if __name__ == "__main__":
    sys.exit(decode(behind))
