"""A pool of Ray actors, one per device. They hold the model and its seats; only the driver writes.

Passages are handed out in units; a worker that is free takes the next one, so no device idles
while units are left. Rows come back one by one as they are certified. A worker that dies gives the
passages without rows back to the queue and is replaced; after three deaths per worker the study
ends with a sentence.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memvec.cramming.engine import Progress
from memvec.errors import MemvecError
from memvec.passages.passage import Passage
from memvec.passages.sources import Source
from memvec.study.cells import Cell
from memvec.study.pool import Here, Texts, Unit
from memvec.study.row import Finished
from memvec.study.spec import ModelSpec
from memvec.study.work import cram_cell

if TYPE_CHECKING:
    from memvec.lm import StartRule

MOST_DEATHS = 3  # per worker, before the study gives up
REFILLS = 4  # a unit has at most this many times the seats of passages
TELL_EVERY = 1.0  # seconds between a worker's news


class News:
    """A small actor that keeps the last progress of each worker, for whoever shows it.

    Workers are busy while they cram, so they tell it and the driver asks it, not them.
    """

    def __init__(self) -> None:
        self.latest: dict[str, Progress] = {}

    def tell(self, name: str, progress: Progress) -> None:
        """A worker's progress."""
        self.latest[name] = progress

    def all(self) -> dict[str, Progress]:
        """Everybody's."""
        return self.latest


class Worker:
    """Lives in an actor: a model on its device."""

    def __init__(
        self, model: ModelSpec, device: str, threads: int, name: str, news: Any = None
    ) -> None:
        import torch

        from memvec.lm import load_lm

        if threads:
            torch.set_num_threads(threads)
        self.name, self.news, self.told = name, news, 0.0
        lm = load_lm(model.name, revision=model.revision, device=device, dtype=model.dtype)
        self.here = Here(lm)

    def facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(model, environment)."""
        return self.here.description(), self.here.environment()

    def find(self, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
        """A cell's passages."""
        return self.here.find(cell, source, count, base)

    def cram(self, unit: Unit) -> Iterator[Finished]:
        """Rows of a unit, streamed."""
        yield from cram_cell(
            self.here.lm,
            unit.cell,
            unit.passages,
            unit.seats,
            worker=self.name,
            on_progress=self._tell,
        )

    def _tell(self, progress: Progress) -> None:
        if self.news is not None and time.monotonic() - self.told > TELL_EVERY:
            self.told = time.monotonic()
            self.news.tell.remote(self.name, progress)

    def line(self, passage: Passage, a: Tensor, b: Tensor, start: StartRule) -> list[float]:
        """Accuracy between two solutions."""
        return self.here.line(passage, a, b, start)


@dataclass
class _Seat:
    """An actor and what it is doing."""

    name: str
    actor: Any
    unit: Unit | None = None
    rows: Any = None  # Ray's stream of rows
    got: set[int] = field(default_factory=set)


class Remote:
    """`workers` actors on this machine, or one per device of a cluster at `address`."""

    def __init__(
        self,
        model: ModelSpec,
        *,
        workers: int = 0,
        address: str | None = None,
        device: str = "auto",
    ) -> None:
        self.ray = _start_ray(workers, address)
        resources = self.ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if device in ("auto", "cuda") else 0
        self.count = workers or gpus or max(1, int(resources.get("CPU", 1)))
        self.model, self.device = model, device
        self.gpu = gpus >= self.count > 0
        cores = os.cpu_count() or 1
        self.threads = 0 if self.gpu else max(1, cores // self.count)
        self._made = self._deaths = 0
        self.news = self.ray.remote(num_cpus=0)(News).remote()
        self._asked: Any = None
        self.seats = [self._hire() for _ in range(self.count)]
        self._description, self._environment = self._first(lambda actor: actor.facts.remote())

    def description(self) -> dict[str, Any]:
        """The model they hold."""
        return dict(self._description)

    def environment(self) -> dict[str, Any]:
        """The first worker's, and how many there are."""
        return {**self._environment, "workers": self.count, "ray": self.ray.__version__}

    def find(self, cell: Cell, source: Source, count: int, base: Path | None) -> Texts:
        """A cell's passages, found by a worker that is free."""
        found: Texts = self._first(lambda actor: actor.find.remote(cell, source, count, base))
        return found

    def line(self, passage: Passage, a: Tensor, b: Tensor, start: StartRule) -> list[float]:
        """Accuracy between two solutions."""
        found: list[float] = self._first(lambda actor: actor.line.remote(passage, a, b, start))
        return found

    def unit_size(self, waiting: int, seats: int) -> int:
        """Enough to refill seats, few enough that all workers have some to the end."""
        share = -(-waiting // (2 * self.count))
        return max(1, min(REFILLS * seats, share))

    def cram(
        self, units: Iterable[Unit], on_progress: Callable[[Progress], None] | None
    ) -> Iterator[Finished]:
        """Rows of all units, as they come. Units are asked for when a worker is free."""
        source, returned, deaths = iter(units), deque[Unit](), 0
        exhausted = False
        while True:
            for i in range(len(self.seats)):
                if self.seats[i].unit is not None or (exhausted and not returned):
                    continue
                unit = returned.popleft() if returned else next(source, None)
                if unit is None:
                    exhausted = True
                    continue
                seat = self.seats[i]  # asking for the unit may have replaced a dead worker
                seat.unit, seat.got = unit, set()
                seat.rows = seat.actor.cram.options(num_returns="streaming").remote(unit)
            busy = [seat for seat in self.seats if seat.unit is not None]
            if not busy:
                return
            ready, _ = self.ray.wait([s.rows for s in busy], num_returns=1, timeout=TELL_EVERY)
            if on_progress is not None and (news := self._news()) is not None:
                on_progress(news)
            for seat in [s for s in busy if any(s.rows is r for r in ready)]:
                try:
                    finished: Finished = self.ray.get(next(seat.rows))
                except StopIteration:
                    # The stream of a killed worker may end without an error: count what came.
                    left = _rest(seat)
                    seat.unit = None
                    if left is not None:
                        returned.append(left)
                        deaths += 1
                        self._give_up(deaths, "its stream ended early")
                        self._replace(seat)
                except self.ray.exceptions.RayActorError as error:
                    deaths += 1
                    left = _rest(seat)
                    self._give_up(deaths, str(error).strip().splitlines()[0])
                    if left is not None:
                        returned.append(left)
                    self._replace(seat)
                except self.ray.exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, MemvecError) else error) from None
                else:
                    seat.got.add(finished.row.number)
                    yield finished

    def close(self) -> None:
        """Let the actors go; a cluster that was there before stays."""
        for seat in self.seats:
            self.ray.kill(seat.actor)
        self.seats = []
        if self.news is not None:
            self.ray.kill(self.news)

    # ------------------------------------------------------------------ inside

    def _news(self) -> Progress | None:
        """What the workers that are busy said last, as one; None while nothing new is known."""
        if self.news is None:
            return None
        if self._asked is None:
            self._asked = self.news.all.remote()
        try:
            ready, _ = self.ray.wait([self._asked], timeout=0)
            if not ready:
                return None
            latest: dict[str, Progress] = self.ray.get(self._asked)
        except self.ray.exceptions.RayActorError:
            self.news = None  # the study goes on without news
            return None
        self._asked = None
        names = [seat.name for seat in self.seats if seat.unit is not None]
        return together([latest[name] for name in names if name in latest])

    def _give_up(self, deaths: int, reason: str) -> None:
        if deaths > MOST_DEATHS * self.count:
            raise MemvecError(
                f"{deaths} workers died, the last one with: {reason}; what is done is kept, the "
                "same command goes on."
            )

    def _hire(self) -> _Seat:
        self._made += 1
        name = f"ray-{self._made}"
        remote = self.ray.remote(max_restarts=0, num_gpus=int(self.gpu), num_cpus=1)(Worker)
        return _Seat(name, remote.remote(self.model, self.device, self.threads, name, self.news))

    def _replace(self, seat: _Seat) -> None:
        self.seats[self.seats.index(seat)] = self._hire()

    def _first(self, call: Callable[[Any], Any]) -> Any:
        """A call to the first idle worker (else the first), tried again on another if it dies."""
        for _ in range(MOST_DEATHS):
            seat = next((s for s in self.seats if s.unit is None), self.seats[0])
            try:
                return self.ray.get(call(seat.actor))
            except self.ray.exceptions.RayActorError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, MemvecError):
                    raise cause from None
                reason = str(error).strip().splitlines()
                self._deaths += 1
                if seat.unit is None:
                    self._replace(seat)
            except self.ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                raise (cause if isinstance(cause, MemvecError) else error) from None
        raise MemvecError(f"workers die at start: {reason[-1] if reason else 'no reason given'}")


def together(told: list[Progress]) -> Progress | None:
    """Several workers' progress as one: sums, and the mean horizon over all their seats."""
    seated = sum(p.seated for p in told)
    if not seated:
        return None
    return Progress(
        seated,
        sum(p.waiting for p in told),
        sum(p.horizon * p.seated for p in told) / seated,
        sum(p.steps for p in told),
        sum(p.tokens for p in told),
    )


def _rest(seat: _Seat) -> Unit | None:
    """What a dead worker leaves: its unit without the passages whose rows came."""
    assert seat.unit is not None
    left = tuple(f for f in seat.unit.passages if f.number not in seat.got)
    return replace(seat.unit, passages=left) if left else None


def _start_ray(workers: int, address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise MemvecError("--workers and --on need Ray: pip install 'memvec[ray]'.") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")  # 30 are few on a busy machine
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(
                num_cpus=max(1, workers),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=200 * 2**20,
            )
    except Exception as error:  # Ray says "the node timed out during startup" with a bare one
        reason = str(error).strip().splitlines()[0]
        raise MemvecError(f"Ray at {address or 'this machine'} does not start: {reason}") from error
    return ray
