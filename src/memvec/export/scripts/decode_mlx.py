"""Decode the passages of this folder with mlx-lm, greedily.

    pip install mlx-lm numpy            (on Linux: 'mlx[cpu]' too)
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings, load_model


def behind(model: Any, inputs: Any, wanted: int) -> list[int]:
    """Greedy token ids behind inputs (N, D)."""
    if does_model_support_input_embeddings(model):
        asked = {"max_tokens": wanted, "input_embeddings": inputs}
        return [int(t) for t, _ in generate_step(mx.array([], dtype=mx.int32), model, **asked)]
    # No such argument (OLMo 2): the inputs take the place of what the model looks up.
    table, cache = model.model.embed_tokens, make_prompt_cache(model)
    model.model.embed_tokens = Looked(table, inputs)
    logits = model(mx.zeros((1, len(inputs)), dtype=mx.int32), cache=cache)
    model.model.embed_tokens = table
    ids = [int(logits[0, -1].argmax().item())]
    while len(ids) < wanted:
        logits = model(mx.array([ids[-1:]]), cache=cache)
        ids.append(int(logits[0, -1].argmax().item()))
    return ids[:wanted]


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


def main(path: str) -> int:
    """Decode every passage; 0 if all have their hashes, else 3."""
    folder = Path(__file__).parent
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    # mlx-lm's code for some models looks for the base of the rotary embedding at the top only.
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    model, _ = load_model(Path(path), model_config={"rope_theta": base} if base else {})
    dtype = getattr(mx, manifest["dtype"])
    model.set_dtype(dtype)
    wrong = 0
    for passage in manifest["passages"]:
        inputs = mx.load(str(folder / passage["file"]))["input_embeddings"]
        ids = passage["starts_with"] + behind(model, inputs.astype(dtype), passage["new_tokens"])
        print(ids)
        digest = hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
        wrong += digest != passage["sha256"]
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
