"""Run an engine in its own environment: write a request, start its Python, read the answer.

memvec needs no engine installed. The runner (memvec/engines/runners, a folder that Python executes)
imports NumPy and the engine only, so any environment that has those will do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memvec.engines.folder import config_of, model_alone
from memvec.engines.request import Prompt, write_request
from memvec.errors import MemvecError, did_you_mean
from memvec.export.limits import refuse
from memvec.writing import path_of

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

RUNNERS = Path(__file__).parent / "runners"
ENGINES = {
    "transformers": "on_transformers",
    "peft": "on_peft",
    "vllm": "on_vllm",
    "vllm-server": "on_vllm_server",
    "llama.cpp": "on_llama_cpp",
    "mlx": "on_mlx",
}
REFUSED = 2  # the runner's exit code for a request that no engine should see


@dataclass(frozen=True)
class Answer:
    """What an engine wrote: its name and release, and token ids of each prompt of each batch."""

    version: str
    ids: list[list[list[int]]]


def known_engine(engine: str) -> str:
    """The engine's name. Raises MemvecError, with the nearest known name, if it is unknown."""
    if engine not in ENGINES:
        raise MemvecError(f"unknown engine '{engine}': {did_you_mean(engine, ENGINES)}")
    return engine


def run_engine(
    engine: str,
    python: str | os.PathLike[str],
    model: str | os.PathLike[str],
    dtype: str,
    prompts: Sequence[Prompt],
    *,
    batches: Sequence[Sequence[int]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """Greedy tokens of an engine after prompts; without `batches`, one prompt at a time.

    `python` is the interpreter of the engine's environment, `model` the model's folder (or, for
    llama.cpp, a GGUF file). Raises MemvecError before the engine starts for an unknown engine or
    vectors that are not as wide as the model's; and, with the last line of the engine's output, for
    an interpreter that is not there or an engine that fails.
    """
    known_engine(engine)
    path = path_of(model)
    _check_width(path, prompts)
    indices = [[i] for i in range(len(prompts))] if batches is None else batches
    with tempfile.TemporaryDirectory() as temporary, model_alone(path) as alone:
        folder = Path(temporary)
        write_request(folder, alone, dtype, prompts, indices, settings=settings)
        start(engine, python, folder)
        return answer_in(folder)


def _check_width(model: Path, prompts: Sequence[Prompt]) -> None:
    """Raise MemvecError for vectors of another width than the folder's model reads."""
    if model.suffix == ".gguf" and model.is_file():
        return  # the runner reads its width
    config = config_of(model)
    width = config.get("word_embed_proj_dim") or config.get("hidden_size") or config.get("n_embd")
    for prompt in prompts:
        if prompt.vectors is not None and width and prompt.vectors.shape[1] != width:
            raise MemvecError(
                f"these vectors have {prompt.vectors.shape[1]} numbers each and the model in "
                f"{model} takes {width}."
            )


def start(engine: str, python: str | os.PathLike[str], *folders: Path) -> None:
    """Run the engine on the requests that lie in folders, one after the other in one process.

    Raises MemvecError as `run_engine`; the requests before the one that failed have their answers.
    """
    words = [str(python), str(RUNNERS), ENGINES[engine], *map(str, folders)]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        ended = subprocess.run(
            words, capture_output=True, text=True, errors="replace", env={**inherited, **quiet}
        )
    except OSError as error:
        raise MemvecError(
            f"there is no Python to run {engine} at {python}: {error.strerror}."
        ) from None
    if ended.returncode:
        raise MemvecError(f"{engine} did not generate: {_reason(ended.returncode, ended.stderr)}")


def answer_in(folder: Path) -> Answer:
    """The answer that an engine wrote into a request's folder."""
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return Answer(answer["version"], answer["ids"])


def _reason(code: int, output: str) -> str:
    """Why an engine ended: a signal, its last error, or the last line of its output."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}."
    lines = [line.strip() for line in output.strip().splitlines()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
    last = lines if code == REFUSED or not errors else errors
    return last[-1] if last else f"exit code {code}"


def refuse_model(engine: str, lm: FrozenLM, model: str | os.PathLike[str] | None = None) -> None:
    """Raise MemvecError, before the engine starts, for a model that it cannot read vectors with."""
    if engine == "llama.cpp" and model is not None and str(model).endswith(".gguf"):
        refuse("llama.cpp", lm, writes_model=False)
    elif engine not in ("transformers", "peft"):
        refuse(engine.removesuffix("-server"), lm)
