"""The pool of a study on Ray, which implements memvec.lab.study.pool.Pool with memvec.workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memvec.lab.sources import Source
from memvec.lab.study.cells import Cell
from memvec.lab.study.pool import LocalPool, StudyUnit, Texts
from memvec.lab.study.row import StoreEntry
from memvec.lab.study.spec import ModelSpec
from memvec.passages.passage import Passage
from memvec.workers import Loading, OnProgress, Workers

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.model.reading import StartRule


class Remote:
    """`workers` actors on this machine, or one per device of a cluster at `address`.

    `options` are further arguments of `load_lm`.
    """

    def __init__(
        self,
        model: ModelSpec,
        *,
        workers: int = 0,
        address: str | None = None,
        device: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        loading = Loading(
            model.name,
            model.revision,
            model.dtype,
            options={"quantize": model.quantize, **(options or {})},
        )
        self.workers = Workers(loading, workers=workers, address=address, device=device)
        self._description, self._environment = self.workers.call(_about)

    def description(self) -> dict[str, Any]:
        """The description of the workers' model."""
        return dict(self._description)

    def environment(self) -> dict[str, Any]:
        """The environment of the first worker, with the number of workers and Ray's version."""
        about = {"workers": self.workers.count, "ray": self.workers.ray.__version__}
        return {**self._environment, **about}

    def find(self, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
        """A cell's passages, found by a free worker."""
        texts: Texts = self.workers.call(_find, cell, source, count, base)
        return texts

    def between(
        self, cell: Cell, passage: Passage, a: Tensor, b: Tensor, start_rule: StartRule
    ) -> list[float]:
        """Measure two restarts `a` and `b` (K, D) of a passage by a cell's protocol."""
        values: list[float] = self.workers.call(_between, cell, passage, (a, b), start_rule)
        return values

    def unit_size(self, waiting: int, batch_size: int) -> int:
        """Passages that go to one worker together."""
        return self.workers.share(waiting, batch_size)

    def cram(self, units: Iterable[StudyUnit], on_progress: OnProgress) -> Iterator[StoreEntry]:
        """Rows of all units as they finish; the next unit is taken when a worker is free."""
        source = iter(units)
        yield from self.workers.stream(lambda: next(source, None), on_progress)

    def close(self) -> None:
        """Stop the workers."""
        self.workers.close()


# Functions that workers call by name: a worker imports this module.


def _about(lm: FrozenLM) -> tuple[dict[str, Any], dict[str, Any]]:
    pool = LocalPool(lm)
    return pool.description(), pool.environment()


def _find(lm: FrozenLM, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
    return LocalPool(lm).find(cell, source, count, base)


def _between(
    lm: FrozenLM,
    cell: Cell,
    passage: Passage,
    restarts: tuple[Tensor, Tensor],
    start_rule: StartRule,
) -> list[float]:
    return LocalPool(lm).between(cell, passage, *restarts, start_rule)
