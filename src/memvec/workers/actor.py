"""The worker in a Ray actor: a model on its device, and the units of work that it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from memvec.cramming.batch import Progress
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM

REPORT_EVERY = 1.0  # seconds between reports of a worker's progress

OnProgress = Callable[[Progress], None] | None


@runtime_checkable
class Unit(Protocol):
    """Work for one worker: several items, each with a key; their results are streamed."""

    def keys(self) -> set[Hashable]:
        """The keys of its items."""

    def without(self, done: set[Hashable]) -> Unit:
        """A copy of the unit without the items that have these keys."""

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, Any]]:
        """Yields (key, result) of each item as soon as it is ready, in the worker so named."""


@dataclass(frozen=True)
class Loading:
    """How each worker loads the model: arguments of `load_lm`.

    `options` are further keyword arguments, for large models.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    encoder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, device: str) -> FrozenLM:
        """The model on a device. Raises MemvecError as `load_lm` does."""
        return load_lm(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            encoder=self.encoder,
            device=device,
            **self.options,
        )


class Worker:
    """A model on its device, inside an actor.

    `threads` is torch's number of threads; 0 leaves the default. `board` is the handle of a
    ProgressBoard.
    """

    def __init__(
        self, loading: Loading, device: str, threads: int, name: str, board: Any = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.name, self.board = name, board
        self._last_report = 0.0
        self.lm = loading.load(device)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(lm, *args)`."""
        return function(self.lm, *args)

    def stream(self, unit: Unit) -> Iterator[tuple[Hashable, Any]]:
        """Yields (key, result) of each item of a unit."""
        yield from unit.work(self.lm, self.name, self._report)

    def _report(self, progress: Progress) -> None:
        if self.board is not None and time.monotonic() - self._last_report > REPORT_EVERY:
            self._last_report = time.monotonic()
            self.board.report.remote(self.name, asdict(progress))
