"""Run an engine in its own environment: write a request, start its Python, read the answer.

memvec needs no engine installed. The runner (memvec/engines/runners, a folder that Python executes)
imports NumPy and the engine only, so any environment that has those will do.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memvec.errors import MemvecError, did_you_mean
from memvec.export.target import embedded, refuse_other_width, refuse_scaled_embeddings

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors

RUNNERS = Path(__file__).parent / "runners"
ENGINES = {"transformers": "on_transformers", "mlx": "on_mlx", "vllm": "on_vllm"}
# Model types whose code in mlx-lm 0.32 takes `input_embeddings` and does not scale them.
MLX_TAKES = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "lfm2"}
LAST_LINES = 3  # of an engine's own error, in ours


@dataclass(frozen=True)
class Answer:
    """What an engine generated: its name and release, and the token ids of each prompt."""

    version: str
    ids: list[list[int]]


def run_engine(
    engine: str,
    python: str | os.PathLike[str],
    model: str | os.PathLike[str],
    dtype: str,
    prompts: Sequence[Tensor],
    new_tokens: Sequence[int],
    *,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """Greedy tokens of an engine behind prompts, each (N, D) on the CPU.

    `python` is the interpreter of the engine's environment, `model` the model's folder, `batch` how
    many prompts the engine gets at once. Raises MemvecError, with the end of what the engine said,
    for an unknown engine, an interpreter that is not there, or an engine that fails.
    """
    if engine not in ENGINES:
        raise MemvecError(f"unknown engine '{engine}': {did_you_mean(engine, ENGINES)}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_request(folder, model, dtype, prompts, new_tokens, batch, dict(settings or {}))
        return start(engine, python, folder)


def write_request(
    folder: Path,
    model: str | os.PathLike[str],
    dtype: str,
    prompts: Sequence[Tensor],
    new_tokens: Sequence[int],
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a request: `request.json`, and one NumPy file of each prompt with its hash."""
    files = []
    for i, (prompt, wanted) in enumerate(zip(prompts, new_tokens, strict=True)):
        path = folder / f"prompt-{i:04}.npy"
        np.save(path, prompt.float().numpy(), allow_pickle=False)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"file": path.name, "sha256": digest, "new_tokens": wanted})
    request = {
        "model": str(model),
        "dtype": dtype,
        "width": prompts[0].shape[1],
        "batch": batch,
        "settings": dict(settings or {}),
        "prompts": files,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def start(engine: str, python: str | os.PathLike[str], folder: Path) -> Answer:
    """Run the engine on a request that lies in `folder`. Raises MemvecError as `run_engine`."""
    words = [str(python), str(RUNNERS), ENGINES[engine], str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env={**kept, **quiet})
    except OSError as error:
        raise MemvecError(
            f"there is no Python to run {engine} at {python}: {error.strerror}."
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
        raise MemvecError(f"{engine} did not generate: {said or f'exit code {done.returncode}'}")
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return Answer(answer["version"], answer["ids"])


def refuse(engine: str, lm: FrozenLM) -> None:
    """Raise MemvecError, before the engine starts, for a model that it cannot read vectors with."""
    if engine == "transformers":
        return
    refuse_other_width(lm, engine)
    refuse_scaled_embeddings(lm, engine)
    kind = str(lm.config.model_type)
    if engine == "mlx" and kind not in MLX_TAKES:
        raise MemvecError(
            f"mlx-lm takes no input embeddings for models of the type {kind}: use another engine."
        )


def decode_with(
    engine: str,
    mem: MemVectors,
    lm: FrozenLM,
    *,
    model: str | os.PathLike[str],
    python: str | os.PathLike[str] = sys.executable,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, list[list[int]]]:
    """Every passage as an engine decodes it: (engine and release, token ids).

    `model` is the folder of the weights that `lm` was loaded from. Raises MemvecError, before the
    engine starts, for vectors of another model, one-step vectors, vectors with corrections, or a
    model that the engine cannot read vectors with.
    """
    mem.check_model(lm)
    if mem.header.layout != "prefix" or any(p.corrections for p in mem.passages):
        raise MemvecError(f"{engine} decodes plain vectors: no one-step layout, no corrections.")
    refuse(engine, lm)
    trigger = mem.view(lm).trigger if mem.header.start_rule == "bos" else None
    prompts, wanted, starts = [], [], []
    for i, record in enumerate(mem.passages):
        begins = [] if record.first is None else [record.first]
        given = begins if trigger is None else [trigger]
        prompts.append(torch.cat([mem.vectors[i].to(lm.dtype), embedded(given, lm)]))
        wanted.append(record.tokens - len(begins))
        starts.append(begins)
    dtype = str(lm.dtype).removeprefix("torch.")
    asked = [i for i, n in enumerate(wanted) if n]  # a passage that is its given token needs none
    answer = run_engine(
        engine,
        python,
        model,
        dtype,
        [prompts[i] for i in asked],
        [wanted[i] for i in asked],
        batch=batch,
        settings=settings,
    )
    new = dict(zip(asked, answer.ids, strict=True))
    return answer.version, [begins + new.get(i, []) for i, begins in enumerate(starts)]
