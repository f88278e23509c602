"""Decode the passages of this folder with llama.cpp, greedily.

    pip install llama-cpp-python numpy gguf
    python make_gguf.py MODEL_FOLDER model.gguf float32    (or llama.cpp's convert_hf_to_gguf.py)
    python decode.py model.gguf

Vectors go through `llama_batch.embd`, tokens through `llama_batch.token`. Prints one list of token
ids for each passage, and ends with 3 if one does not have the hash of what was crammed.
"""

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

CACHE = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers for the types


def step(context: Any, inputs: Any, start: int) -> Any:
    """Logits behind vectors (n, D) or a list of token ids, at positions from `start`."""
    vectors = isinstance(inputs, np.ndarray)
    batch = lib.llama_batch_init(len(inputs), inputs.shape[1] if vectors else 0, 1)
    batch.n_tokens = len(inputs)
    for i in range(len(inputs)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
        batch.logits[i] = i == len(inputs) - 1
        if not vectors:
            batch.token[i] = inputs[i]
    if vectors:
        ctypes.memmove(batch.embd, inputs.ctypes.data, inputs.nbytes)
    if lib.llama_decode(context, batch):
        sys.exit("llama_decode failed: the passage does not fit the context.")
    lib.llama_batch_free(batch)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(lib.llama_get_model(context)))
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,))


def main(path: str) -> int:
    """Decode every passage; 0 if all have their hashes, else 3."""
    folder = Path(__file__).parent
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model or lib.llama_model_n_embd(model) != manifest["width"]:
        sys.exit(f"{path} is no model that reads vectors of {manifest['width']} numbers.")
    params = lib.llama_context_default_params()
    # Both change arg-maxes where they are left as they are.
    params.flash_attn_type, params.type_k = 0, CACHE[manifest["dtype"]]
    params.type_v = params.type_k
    context = lib.llama_init_from_model(model, params)
    wrong = 0
    for passage in manifest["passages"]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        vectors = np.load(folder / passage["file"], allow_pickle=False)
        logits, at = step(context, vectors, 0), len(vectors)
        if passage["given"]:
            logits, at = step(context, passage["given"], at), at + len(passage["given"])
        ids = list(passage["starts_with"])
        for _ in range(passage["new_tokens"]):
            ids.append(int(logits.argmax()))
            logits, at = step(context, ids[-1:], at), at + 1
        print(ids)
        digest = hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
        wrong += digest != passage["sha256"]
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
