"""The interface of a pool of workers, and the pool whose only worker is this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from memvec.cramming.batch import Progress
from memvec.cramming.starts import view_for
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.sources import Source, SourcedPassage
from memvec.lab.study.cells import Cell
from memvec.lab.study.row import StoreEntry, Text
from memvec.lab.study.work import cram_cell, find_passages
from memvec.machine import environment
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage


@dataclass(frozen=True)
class StudyUnit:
    """Passages of one cell that go to one worker together.

    The passages in `beside` have rows from a worker that died before it finished the unit. They are
    crammed again, with the same result, because they share a vector with the others.
    """

    cell: Cell
    passages: tuple[SourcedPassage, ...]
    batch_size: int
    beside: tuple[SourcedPassage, ...] = ()

    def keys(self) -> set[Hashable]:
        """The numbers of its passages."""
        return {sourced.number for sourced in self.passages}

    def without(self, done: set[Hashable]) -> StudyUnit:
        """The unit without the passages whose numbers are done."""
        left = tuple(p for p in self.passages if p.number not in done)
        if not protocol_of(self.cell.protocol).group_size(self.cell.options):
            return replace(self, passages=left)
        had = tuple(p for p in self.passages if p.number in done)
        return replace(self, passages=left, beside=(*self.beside, *had))

    def work(
        self, lm: FrozenLM, worker: str, on_progress: Callable[[Progress], None] | None
    ) -> Iterator[tuple[Hashable, StoreEntry]]:
        """Rows, each as soon as its passage is certified."""
        for finished in cram_cell(
            lm,
            self.cell,
            self.passages,
            self.batch_size,
            beside=self.beside,
            worker=worker,
            on_progress=on_progress,
        ):
            yield finished.row.number, finished


@dataclass(frozen=True)
class Texts:
    """Passages with their texts, as the store keeps them."""

    passages: list[SourcedPassage]
    texts: list[Text | None]


@runtime_checkable
class Pool(Protocol):
    """The interface that a run needs of its workers."""

    def description(self) -> dict[str, Any]:
        """The description of the workers' model."""

    def environment(self) -> dict[str, Any]:
        """The environment of the workers."""

    def find(self, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
        """A cell's passages."""

    def cram(
        self, units: Iterable[StudyUnit], on_progress: Callable[[Progress], None] | None
    ) -> Iterator[StoreEntry]:
        """Rows of all units, in any order."""

    def between(
        self, cell: Cell, passage: Passage, a: Tensor, b: Tensor, start_rule: StartRule
    ) -> list[float]:
        """Measure two restarts of a passage by a cell's protocol, from their vectors (K, D)."""

    def unit_size(self, waiting: int, batch_size: int) -> int:
        """Passages that go to one worker together."""

    def close(self) -> None:
        """Stop the workers."""


class LocalPool:
    """This process is the only worker."""

    def __init__(self, lm: FrozenLM) -> None:
        self.lm = lm

    def description(self) -> dict[str, Any]:
        """The description of the model."""
        return self.lm.description()

    def environment(self) -> dict[str, Any]:
        """The environment of this process."""
        return environment(self.lm.device)

    def find(self, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
        """A cell's passages."""
        passages = find_passages(self.lm, cell, source, count, base)
        return Texts(passages, [text_of(self.lm, p) for p in passages])

    def cram(
        self, units: Iterable[StudyUnit], on_progress: Callable[[Progress], None] | None
    ) -> Iterator[StoreEntry]:
        """Rows of all units, one unit after the other."""
        for unit in units:
            yield from (row for _, row in unit.work(self.lm, "local", on_progress))

    def between(
        self, cell: Cell, passage: Passage, a: Tensor, b: Tensor, start_rule: StartRule
    ) -> list[float]:
        """Measure two restarts `a`, `b` (K, D) of a passage, with the cell's trigger and front."""
        view = view_for(self.lm, cell.to_recipe())
        values: list[float] = protocol_of(cell.protocol).between(view, passage, a, b, start_rule)
        return values

    def unit_size(self, waiting: int, batch_size: int) -> int:
        """All passages of a cell, from which the slots are refilled."""
        return max(1, waiting)

    def close(self) -> None:
        """There are no workers to stop."""


def text_of(lm: FrozenLM, sourced: SourcedPassage) -> Text | None:
    """The passage's text; None without a tokenizer."""
    if lm.tokenizer is None:
        return None
    ids = sourced.passage.ids
    return Text(lm.text(ids).encode("utf-8", "surrogatepass"), [lm.text([token]) for token in ids])


def in_units(
    cell: Cell,
    passages: Sequence[SourcedPassage],
    size: int,
    batch_size: int,
    done: Collection[int] = (),
) -> Iterator[StudyUnit]:
    """Units of `size` passages that are not done; groups that share a vector make one unit each.

    All passages of a group are done, or none.
    """
    left = [p for p in passages if p.number not in done]
    group = protocol_of(cell.protocol).group_size(cell.options)
    if not group:
        for at in range(0, len(left), size):
            yield StudyUnit(cell, tuple(left[at : at + size]), batch_size)
        return
    for key in sorted({p.number // group for p in left}):
        waiting = tuple(p for p in left if p.number // group == key)
        yield StudyUnit(cell, waiting, batch_size)
