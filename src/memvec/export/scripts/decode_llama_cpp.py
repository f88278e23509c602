"""Decode the passages of this folder with llama.cpp, greedily.

    pip install llama-cpp-python numpy gguf
    python decode.py MODEL          (its folder, or a GGUF file of it, for instance by make_gguf.py)

Vectors go through `llama_batch.embd`, tokens through `llama_batch.token`. Prints one list of token
ids for each passage, and ends with 3 if one does not have the hash of what was crammed.
"""

import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from make_gguf import write
from passages import FOLDER, MANIFEST, decode, model_folder, refuse_width

CACHE = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers for the types


def step(context: Any, inputs: Any, start: int) -> Any:
    """Logits after vectors (n, D) or a list of token ids, at positions from `start`."""
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


def loaded(given: Path) -> Any:
    """The model of a GGUF file, or of a folder, of which such a file is written first."""
    params = lib.llama_model_default_params()
    with tempfile.TemporaryDirectory() as made:
        path = given
        if given.is_dir():
            path = Path(made) / "model.gguf"
            params.use_mmap = False  # the file is gone when it is read
            write(model_folder(), path, MANIFEST["dtype"])
        model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit(f"{given} is no model that llama.cpp loads.")
    refuse_width(str(given), lib.llama_model_n_embd(model))
    return model


def main(given: Path) -> None:
    """Decode every passage, and end with 0 if all have their hashes, else 3."""
    lib.llama_backend_init()
    params = lib.llama_context_default_params()
    # Both change arg-maxes where they are left as they are.
    params.flash_attn_type, params.type_k = 0, CACHE[MANIFEST["dtype"]]
    params.type_v = params.type_k
    # The context is 512 tokens long where it is left as it is.
    longest = max(
        len(np.load(FOLDER / item["file"], mmap_mode="r")) + len(item["given"]) + item["new_tokens"]
        for item in MANIFEST["passages"]
    )
    params.n_ctx = params.n_batch = params.n_ubatch = max(512, longest)
    context = lib.llama_init_from_model(loaded(given), params)

    def after(path: Path, passage: dict[str, Any]) -> list[int]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        vectors = np.load(path, allow_pickle=False)
        logits, n = step(context, vectors, 0), len(vectors)
        if passage["given"]:
            logits, n = (
                step(context, passage["given"], n),
                n + len(passage["given"]),
            )
        ids = [int(logits.argmax())]
        while len(ids) < passage["new_tokens"]:
            logits, n = step(context, ids[-1:], n), n + 1
            ids.append(int(logits.argmax()))
        return ids

    sys.exit(decode(after))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) == 2 else "MODEL"))
