"""Decode the passages of this folder with mlx-lm, greedily.

    pip install mlx-lm                  (on Linux: 'mlx[cpu]' too)
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings, load_model
from passages import MANIFEST, decode, model_folder


def written(model: Any, inputs: Any, new_tokens: int) -> list[int]:
    """Greedy token ids after inputs (N, D)."""
    if does_model_support_input_embeddings(model):
        options = {"max_tokens": new_tokens, "input_embeddings": inputs}
        return [int(t) for t, _ in generate_step(mx.array([], dtype=mx.int32), model, **options)]
    # No such argument (OLMo 2): the inputs take the place of what the model looks up.
    table, cache = model.model.embed_tokens, make_prompt_cache(model)
    model.model.embed_tokens = Looked(table, inputs)
    logits = model(mx.zeros((1, len(inputs)), dtype=mx.int32), cache=cache)
    model.model.embed_tokens = table
    ids = [int(logits[0, -1].argmax().item())]
    while len(ids) < new_tokens:
        logits = model(mx.array([ids[-1:]]), cache=cache)
        ids.append(int(logits[0, -1].argmax().item()))
    return ids


class Looked:
    """Stands for a table of embeddings while a prompt of vectors is read."""

    def __init__(self, table: Any, inputs: Any) -> None:
        self.table, self.inputs = table, inputs

    def __call__(self, ids: Any) -> Any:
        """The vectors (1, N, D), whatever the ids."""
        return self.inputs[None]

    def as_linear(self, states: Any) -> Any:
        """Logits of a head that is tied to the embeddings."""
        return self.table.as_linear(states)


def main(folder: Path) -> None:
    """Decode every passage, and end with 0 if all have their hashes, else 3."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # mlx-lm's code for some models looks for the base of the rotary embedding at the top only.
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    model, _ = load_model(folder, model_config={"rope_theta": base} if base else {})
    dtype = getattr(mx, MANIFEST["dtype"])
    model.set_dtype(dtype)

    def after(path: Path, passage: dict[str, Any]) -> list[int]:
        inputs = mx.load(str(path))["input_embeddings"].astype(dtype)
        return written(model, inputs, passage["new_tokens"])

    sys.exit(decode(after))


if __name__ == "__main__":
    main(model_folder())
