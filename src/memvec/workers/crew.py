"""Crams a document's passages on many workers, with the interface of one engine."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace

from memvec.cramming.batch import Job, Waiting
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.storage import storage_of
from memvec.workers.actor import OnProgress
from memvec.workers.pool import Workers


@dataclass(frozen=True)
class Batch:
    """A unit of passages, and how to cram them: K = `vectors` each, B = `batch_size` slots."""

    passages: tuple[Passage, ...]
    recipe: Recipe
    _: KW_ONLY
    vectors: int
    batch_size: int
    storage: str
    layout: str

    def keys(self) -> set[Hashable]:
        """(document, offset in tokens) of each passage."""
        return {(p.document, p.offset) for p in self.passages}

    def without(self, done: set[Hashable]) -> Batch:
        """The batch without the passages of these keys."""
        left = tuple(p for p in self.passages if (p.document, p.offset) not in done)
        return replace(self, passages=left)

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, Outcome]]:
        """Yields (key, outcome) of each passage, as soon as it is certified."""
        engine = Engine(
            lm.read_as(self.layout),
            self.recipe,
            vectors=self.vectors,
            batch_size=self.batch_size,
            storage=storage_of(self.storage),
            on_progress=on_progress,
        )
        for outcome in engine.run(self.passages):
            yield (outcome.passage.document, outcome.passage.offset), outcome


class Crew:
    """Many engines with the methods `push` and `run` of one; free workers take passages."""

    def __init__(self, workers: Workers, batch: Batch, on_progress: OnProgress = None) -> None:
        self.workers, self.batch, self.on_progress = workers, batch, on_progress
        self.waiting = Waiting()

    def push(self, passage: Passage) -> None:
        """Add a passage; this is also possible during `run`."""
        self.waiting.push(Job(passage, self.batch.recipe.margin))

    def run(self, passages: Iterable[Passage] = ()) -> Iterator[Outcome]:
        """Cram `passages` and all that wait; yields each outcome as soon as it is ready."""
        for passage in passages:
            self.push(passage)
        yield from self.workers.stream(self._next_batch, self.on_progress)

    def _next_batch(self) -> Batch | None:
        """A unit of the next waiting passages, longest first; None if none waits."""
        n = min(len(self.waiting), self.workers.share(len(self.waiting), self.batch.batch_size))
        if not n:
            return None
        return replace(self.batch, passages=tuple(self.waiting.pop().passage for _ in range(n)))
