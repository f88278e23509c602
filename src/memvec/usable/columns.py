"""Columns of an evaluation: the inputs that replace the context in front of a question.

A request is a context (a passage, or worked examples) and a question after it. Each column replaces
the context by other inputs:

    full       the model's start token and the context
    none       the start token
    truncated  the start token and the last tokens of the context, one token for each vector of the
               column `crammed`, so that both have the same number of inputs
    crammed    the vectors of the context, passage by passage

The question and the answer are the same token ids in every column.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cram_job import CramJob, CramStatus
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import view_for
from memvec.errors import MemvecError, check_minimum, did_you_mean
from memvec.journal import Journal
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document
from memvec.passages.passage import Passage, ids_hash
from memvec.storage import storage_of
from memvec.usable.queries import text_inputs
from memvec.usable.recipe_files import named_files
from memvec.writing import make_folder, path_of

ColumnName = Literal["full", "none", "truncated", "crammed"]
COLUMNS: tuple[ColumnName, ...] = get_args(ColumnName)
SPLIT = "\n\n"  # what the harness writes between worked examples, and before the question
STORAGE = "float32"
Ids = tuple[int, ...]


class StandIn(NamedTuple):
    """The inputs that replace one context.

    `slots` is the number of vectors or tokens, without the start token in front. `exact` says
    whether the vectors give the context back.
    """

    inputs: Float[Tensor, "1 N D"]
    slots: int
    exact: bool | None  # None: there are no vectors


class Request(NamedTuple):
    """Token ids of a context, of the question after it, and of an answer."""

    context: Ids
    question: Ids
    answer: Ids


def column_named(name: str) -> ColumnName:
    """The column of a name. Raises MemvecError for an unknown name."""
    for column in COLUMNS:
        if column == name:
            return column
    raise MemvecError(f"there is no column '{name}': {did_you_mean(name, COLUMNS)}")


def split_text(text: str, split: str = SPLIT) -> tuple[str, str]:
    """Split a prompt into context and question, at the last occurrence of `split`.

    Leading white space of `split` belongs to the context, the rest of it to the question. A prompt
    without `split` is a question without a context.
    """
    at = text.rstrip().rfind(split)
    if at < 0:
        return "", text
    at += len(split) - len(split.lstrip())
    return text[:at], text[at:]


def request_of(lm: FrozenLM, prompt: str, answer: str = "", split: str = SPLIT) -> Request:
    """A prompt and an answer as token ids; the whole text is tokenized at once.

    A token that crosses the border between context and question is part of the question: the
    context is the common prefix of its own tokens and those of the prompt. If there is an answer,
    white space at the end of the prompt belongs to it, as in the harness. A start token that a chat
    template has added is removed, because every column adds one.
    """
    context, _ = split_text(prompt, split)
    stripped = prompt.rstrip() if answer else prompt
    before, whole = lm.tokenize(stripped), lm.tokenize(prompt + answer)
    context_ids = lm.tokenize(context) if context else []
    shared = 0
    while shared < min(len(context_ids), len(before)) and context_ids[shared] == before[shared]:
        shared += 1
    first = 1 if before and before[0] == lm.bos_id else 0
    return Request(
        tuple(before[first:shared]),
        tuple(before[max(first, shared) :]),
        tuple(whole[len(before) :]) if answer else (),
    )


class Column:
    """One column of an evaluation.

    A context is cut into equal passages of at most `tokens` tokens. Each is crammed into `vectors`
    (K) vectors by `recipe`, `batch_size` at once. `cache` is a folder that keeps crammed passages;
    its key contains the model, the recipe and the token ids. `on_status` is called with the
    progress of cramming. Raises MemvecError for an unknown column, sizes below 1, another space
    than inputs, or a folder that cannot be written.
    """

    def __init__(
        self,
        lm: FrozenLM,
        name: str = "full",
        *,
        vectors: int = 8,
        tokens: int = 48,
        recipe: Recipe | None = None,
        batch_size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        on_status: Callable[[CramStatus], None] | None = None,
    ) -> None:
        check_minimum(1, vectors=vectors, tokens=tokens)
        self.lm, self.name = lm, column_named(name)
        self.vectors, self.tokens, self.batch_size = vectors, tokens, batch_size
        self.recipe = recipe or Recipe.of("usable")
        if self.recipe.space != "inputs":
            raise MemvecError(
                f"a context is crammed into inputs here: leave out the space '{self.recipe.space}'."
            )
        self.cache = None if cache is None else path_of(cache)
        self.on_status = on_status
        self._crammed: dict[Ids, list[Outcome]] = {}

    def pieces(self, ids: Ids) -> list[tuple[int, int]]:
        """Start and end of each passage of a context; their lengths differ by at most one token."""
        n = -(-len(ids) // self.tokens)
        edges = [len(ids) * i // n for i in range(n + 1)] if n else []
        return list(itertools.pairwise(edges))

    def prepare(self, contexts: Iterable[Ids]) -> None:
        """Cram all new contexts together. Raises MemvecError as Engine does."""
        if self.name != "crammed":
            return
        new = [ids for ids in dict.fromkeys(contexts) if ids and ids not in self._crammed]
        if new:
            self._cram(new)

    def stand_in(self, ids: Ids) -> StandIn:
        """The inputs that replace a context in this column."""
        if self.name == "crammed" and ids:
            self.prepare([ids])
            outcomes = self._crammed[ids]
            rows = torch.cat([outcome.vectors.float() for outcome in outcomes])[None]
            exact = all(outcome.exact for outcome in outcomes)
            view = view_for(self.lm, self.recipe)
            inputs = view.after_front(view.context_scale * rows.to(self.lm.device))
            return StandIn(inputs, rows.shape[1], exact)
        count = {
            "full": len(ids),
            "truncated": min(len(ids), self.vectors * len(self.pieces(ids))),
        }.get(self.name, 0)
        return StandIn(text_inputs(self.lm, ids[len(ids) - count :]), count, None)

    def _cram(self, contexts: list[Ids]) -> None:
        documents = [
            Document(ids, f"context {i}", ids_hash(ids), len(ids)) for i, ids in enumerate(contexts)
        ]
        passages = [
            Passage(ids[start:end], i, start)
            for i, ids in enumerate(contexts)
            for start, end in self.pieces(ids)
        ]
        # halve=False: the column `truncated` has as many tokens as these passages have vectors.
        job = CramJob(
            self.lm,
            documents,
            self.vectors,
            tokens=self.tokens,
            recipe=self.recipe,
            batch_size=self.batch_size,
            storage=storage_of(STORAGE),
            halve=False,
            on_status=self.on_status,
        )
        job.choose_batch_size(passages)
        job.journal = self._journal(job)
        try:
            job.cram(passages)
        finally:
            if job.journal is not None:
                job.journal.close()
        for (document, _), outcome in sorted(job.done.items()):
            self._crammed.setdefault(contexts[document], []).append(outcome)

    def _journal(self, job: CramJob) -> Journal | None:
        """The journal in the cache folder, under all settings that decide the vectors; or None."""
        if self.cache is None:
            return None
        make_folder(self.cache)
        settings = {
            "model": self.lm.description(),
            "recipe": job.engine.recipe.record(),
            "vectors": self.vectors,
            "storage": STORAGE,
            "start_rule": job.engine.start_rule,
            **named_files(job.engine.recipe),
        }
        return Journal(self.cache / "contexts.journal", settings)
