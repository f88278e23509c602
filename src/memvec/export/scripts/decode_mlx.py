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

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


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
        steps = generate_step(
            mx.array([], dtype=mx.int32),
            model,
            max_tokens=passage["new_tokens"],
            input_embeddings=inputs.astype(dtype),
        )
        ids = passage["starts_with"] + [int(token) for token, _ in steps]
        print(ids)
        digest = hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
        wrong += digest != passage["sha256"]
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
