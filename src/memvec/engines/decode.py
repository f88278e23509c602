"""What an engine gives back from vectors: the passages, or an answer after a prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from memvec.companions.around import in_full
from memvec.engines.folder import folder_of
from memvec.engines.request import Prompt
from memvec.engines.run import known_engine, refuse_model, run_engine
from memvec.errors import MemvecError, check_minimum
from memvec.export.target import embedded, refuse_other_weights
from memvec.usable.generate import SHORTER, check_room, context_inputs, end_ids

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors


def decode_with(
    engine: str,
    lm: FrozenLM,
    mem: MemVectors,
    *,
    model: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] = sys.executable,
    batch: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, list[list[int]]]:
    """Every passage as an engine decodes it: (engine and release, token ids).

    `model` is the folder of the weights that `lm` was loaded from (or a GGUF file of them, for
    llama.cpp); `batch` prompts are given to the engine at once. Raises MemvecError before the
    engine starts for vectors of another model, one-step vectors, vectors with corrections, or a
    model that the engine cannot read vectors with, and otherwise as `run_engine`.
    """
    check_minimum(1, batch=batch)
    check(engine, mem, lm, model)
    prompts, starts = passage_prompts(mem, lm)
    indices = [i for i, p in enumerate(prompts) if p.new_tokens]  # a given token needs no engine
    batches = [indices[at : at + batch] for at in range(0, len(indices), batch)]
    answer = run_engine(
        engine,
        python,
        folder_of(lm) if model is None else model,
        str(lm.dtype).removeprefix("torch."),
        prompts,
        batches=batches,
        settings=settings,
    )
    new = dict(zip(indices, (ids for batch in answer.ids for ids in batch), strict=True))
    return answer.version, [begins + new.get(i, []) for i, begins in enumerate(starts)]


def answer_with(
    engine: str,
    lm: FrozenLM,
    mem: MemVectors | Sequence[MemVectors],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    passages: Sequence[int] | None = None,
    model: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] = sys.executable,
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """What an engine writes, greedily, after vectors for use and a prompt: (release, text).

    The same inputs as `memvec.use` gives to the model itself; the text ends before the model's
    first end-of-text token. Raises MemvecError as `decode_with`, for vectors that are not for use
    (start rule 'vectors'), and for files or passages that are not there.
    """
    files = list(mem) if isinstance(mem, Sequence) else [mem]
    if not files:
        raise MemvecError("there are no vectors to use: give at least one file.")
    for file in files:
        check(engine, file, lm, model)
    vectors_and_prompt = use_prompt(lm, files, prompt, max_new_tokens, passages)
    answer = run_engine(
        engine,
        python,
        folder_of(lm) if model is None else model,
        str(lm.dtype).removeprefix("torch."),
        [vectors_and_prompt],
        settings=settings,
    )
    (ids,) = answer.ids[0]
    ends = [i for i, token in enumerate(ids) if token in end_ids(lm)]
    return answer.version, lm.text(ids[: ends[0]] if ends else ids)


def use_prompt(
    lm: FrozenLM,
    files: Sequence[MemVectors],
    prompt: str,
    new_tokens: int,
    passages: Sequence[int] | None = None,
) -> Prompt:
    """The vectors of files, one after the other, and a prompt after them.

    Raises MemvecError as `memvec.usable.generate.context_inputs`, for fewer than 1 new tokens, or
    more inputs than the model's context holds.
    """
    vectors = context_inputs(lm, files, passages)
    tokens = lm.tokenize(prompt)
    check_minimum(1, max_new_tokens=new_tokens)
    check_room(lm, len(vectors) + len(tokens), new_tokens, SHORTER)
    return Prompt(vectors.float(), tokens, new_tokens, embedded(tokens, lm).float(), prompt)


def check(
    engine: str, mem: MemVectors, lm: FrozenLM, model: str | os.PathLike[str] | None = None
) -> None:
    """Raise MemvecError if an engine cannot be asked for these vectors; nothing is started."""
    known_engine(engine)
    mem.check_model(lm)
    refuse_other_weights(lm, engine)
    if (
        mem.header.layout != "prefix"
        or mem.header.space
        or any(p.corrections for p in mem.passages)
    ):
        raise MemvecError(
            f"{engine} decodes plain vectors: no one-step layout, no other space than inputs, no "
            "corrections."
        )
    refuse_model(engine, lm, model)


def passage_prompts(mem: MemVectors, lm: FrozenLM) -> tuple[list[Prompt], list[list[int]]]:
    """The prompt of each passage, and the tokens of it that are given and not generated."""
    plain = mem.header.start_rule == "bos" and not mem.soft
    view = mem.view(lm)
    trigger = list(view.trigger) if plain else []
    prompts, starts = [], []
    for vectors, record in zip(mem.vectors, mem.passages, strict=True):
        begins = [] if record.first is None else [record.first]
        given = trigger or begins
        new_tokens = record.tokens - len(begins)
        # As the model reads them: rounded to its dtype.
        cast = in_full(view, vectors).to(lm.dtype).to(torch.float32)
        prompts.append(Prompt(cast, given, new_tokens, embedded(given, lm).float()))
        starts.append(begins)
    return prompts, starts
