"""llama.cpp: vectors through `llama_batch.embd`, token ids after them through `llama_batch.token`.

The model is a GGUF file, or a folder of which one is made (gguf_of.py). All sequences of a batch
are decoded together, each with its own part of the cache. The cache is as precise as the model's
dtype asks for, and flash attention is off: both settings change arg-maxes otherwise.
`settings["threads"]` is the number of threads (1).
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from asked import Prompt, RequestError, release_of

CACHE = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers for the types
SEQUENCES = 32  # at the most, decoded together
ERROR = 4  # ggml's level of the log
ERRORS: list[str] = []  # errors of llama.cpp


def version() -> str:
    """The engine and its release: that of the Python package, which holds its own llama.cpp."""
    return f"llama.cpp ({release_of('llama-cpp-python')})"


def first_error() -> str:
    """The first error of llama.cpp's log: the others follow from it."""
    return ERRORS[0] if ERRORS else "it does not say why."


def _keep(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        ERRORS.append(text.decode(errors="replace").strip())


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_keep)


class Engine:
    """A model and a context of llama.cpp. Raises RequestError if either cannot be made."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        lib.llama_log_set(LOG, None)
        lib.llama_backend_init()
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(model)
            if path.is_dir():
                import gguf_of

                path = Path(temporary) / "model.gguf"
                try:
                    gguf_of.write(Path(model), path, dtype)
                except ValueError as error:
                    raise RequestError(str(error)) from None
            model_params = lib.llama_model_default_params()
            model_params.n_gpu_layers = 0
            model_params.use_mmap = False  # the file is gone when it is read
            self.model = lib.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise RequestError(f"llama.cpp does not load {model}: {first_error()}")
        self.width = lib.llama_model_n_embd(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.name, self.cache = model, CACHE[dtype]
        self.threads = settings.get("threads", 1)
        self.context, self.room = None, 0  # made for the longest prompts so far

    def make_room(self, prompts: list[Prompt]) -> None:
        """Make a context in which SEQUENCES sequences as long as the longest of these fit.

        One of the model's whole window would take hundreds of GiB for a long window.
        """
        longest = max(prompt.length for prompt in prompts)
        if longest <= self.room:
            return
        if self.context:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        params.n_ctx = longest * SEQUENCES
        params.n_batch = params.n_ubatch = max(longest, SEQUENCES)
        params.n_seq_max = SEQUENCES
        params.type_k = params.type_v = self.cache
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        self.context, self.room = lib.llama_init_from_model(self.model, params), longest
        if not self.context:
            raise RequestError(f"llama.cpp makes no context for {self.name}: {first_error()}")

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt."""
        self.make_room(prompts)
        ids: list[list[int]] = []
        for at in range(0, len(prompts), SEQUENCES):
            ids += self.together(prompts[at : at + SEQUENCES])
        return ids

    def together(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids of sequences that share every step after their prompts."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        past = [0] * len(prompts)
        written: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            if prompt.inputs is not None:
                rows = prompt.inputs[: prompt.vectors]
                if rows.shape[1] != self.width:
                    raise RequestError(
                        f"the vectors have {rows.shape[1]} numbers each and the model takes "
                        f"{self.width}."
                    )
                logits = self.step([(i, at, row) for at, row in enumerate(rows)])
                past[i] = len(rows)
            if prompt.tokens:
                after = [(i, past[i] + at, token) for at, token in enumerate(prompt.tokens)]
                logits = self.step(after)
                past[i] += len(prompt.tokens)
            written[i].append(int(logits[-1].argmax()))
        while True:
            going = [i for i, p in enumerate(prompts) if len(written[i]) < p.new_tokens]
            if not going:
                return [row[: p.new_tokens] for row, p in zip(written, prompts, strict=True)]
            logits = self.step([(i, past[i], written[i][-1]) for i in going])
            for i, row in zip(going, logits, strict=True):
                past[i] += 1
                written[i].append(int(row.argmax()))

    def step(self, inputs: list[tuple[int, int, Any]]) -> Any:
        """Logits (n, V) after n inputs (sequence, position, token id or vector (D))."""
        vectors = not isinstance(inputs[0][2], int)
        batch = lib.llama_batch_init(len(inputs), self.width if vectors else 0, 1)
        try:
            batch.n_tokens = len(inputs)
            for j, (sequence, position, value) in enumerate(inputs):
                batch.pos[j], batch.n_seq_id[j], batch.seq_id[j][0] = position, 1, sequence
                batch.logits[j] = 1
                if not vectors:
                    batch.token[j] = value
            if vectors:
                rows = np.ascontiguousarray([value for *_, value in inputs], dtype=np.float32)
                ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
            if lib.llama_decode(self.context, batch):
                raise RequestError("llama_decode failed: the inputs do not fit the context.")
            return np.stack(
                [
                    np.ctypeslib.as_array(
                        lib.llama_get_logits_ith(self.context, j), (self.vocabulary,)
                    ).copy()
                    for j in range(len(inputs))
                ]
            )
        finally:
            lib.llama_batch_free(batch)
