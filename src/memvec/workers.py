"""Workers: Ray actors, one per device. Each holds the model and its slots; only the driver writes.

Work is handed out in units; a worker that is free takes the next one, so no device idles while
units are left. Results come back one by one as they are ready. A worker that dies gives what has
no result yet back to the queue and is replaced; after three deaths per worker the run ends with a
sentence. What a unit is, its owner says: passages of a study's cell (memvec.lab), or of a long
document (`Crew`, for memvec.codec).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from memvec.cramming.certify import Outcome
from memvec.cramming.engine import Engine, Job, Progress, Waiting
from memvec.errors import MemvecError
from memvec.storage import storage_of

if TYPE_CHECKING:
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM
    from memvec.passages.passage import Passage

MOST_DEATHS = 3  # per worker, before the run gives up
REFILLS = 4  # a unit has at most this many times the slots of passages
TELL_EVERY = 1.0  # seconds between a worker's news

OnProgress = Callable[[Progress], None] | None


@runtime_checkable
class Unit(Protocol):
    """Work for one worker: several things with a key each, whose results it streams."""

    def keys(self) -> set[Hashable]:
        """What it has."""

    def without(self, done: set[Hashable]) -> Unit:
        """The rest of it."""

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, Any]]:
        """(key, result) of each, as they become ready."""


@dataclass(frozen=True)
class Loading:
    """How each worker loads the model: arguments of `load_lm`, `options` those for big ones."""

    name: str
    revision: str | None = None
    dtype: str = "auto"
    encoder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, device: str) -> FrozenLM:
        """The model on a device."""
        from memvec.loading import load_lm

        return load_lm(
            self.name,
            revision=self.revision,
            dtype=self.dtype,
            encoder=self.encoder,
            device=device,
            **self.options,
        )


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
        self, loading: Loading, device: str, threads: int, name: str, news: Any = None
    ) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.name, self.news, self.told = name, news, 0.0
        self.lm = loading.load(device)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of the model says."""
        return function(self.lm, *args)

    def stream(self, unit: Unit) -> Iterator[tuple[Hashable, Any]]:
        """Results of a unit."""
        yield from unit.work(self.lm, self.name, self._tell)

    def _tell(self, progress: Progress) -> None:
        if self.news is not None and time.monotonic() - self.told > TELL_EVERY:
            self.told = time.monotonic()
            self.news.tell.remote(self.name, progress)


@dataclass
class _Slot:
    """An actor and what it is doing."""

    name: str
    actor: Any
    unit: Unit | None = None
    results: Any = None  # Ray's stream of them
    got: set[Hashable] = field(default_factory=set)


class Workers:
    """`workers` actors on this machine, or one per device of a cluster at `address`."""

    def __init__(
        self,
        loading: Loading,
        *,
        workers: int = 0,
        address: str | None = None,
        device: str = "auto",
    ) -> None:
        self.ray = _start_ray(workers, address)
        resources = self.ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if device in ("auto", "cuda") else 0
        self.count = workers or gpus or max(1, int(resources.get("CPU", 1)))
        self.loading, self.device = loading, device
        self.gpu = gpus >= self.count > 0
        cores = os.cpu_count() or 1
        self.threads = 0 if self.gpu else max(1, cores // self.count)
        self._made = self._deaths = 0
        self.news = self.ray.remote(num_cpus=0)(News).remote()
        self._asked: Any = None
        self.batch_size = [self._hire() for _ in range(self.count)]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(lm, *args)` in the first idle worker, tried again on another if it dies."""
        for _ in range(MOST_DEATHS):
            slot = next((s for s in self.batch_size if s.unit is None), self.batch_size[0])
            try:
                return self.ray.get(slot.actor.call.remote(function, *args))
            except self.ray.exceptions.RayActorError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, MemvecError):
                    raise cause from None
                reason = str(error).strip().splitlines()
                self._deaths += 1
                if slot.unit is None:
                    self._replace(slot)
            except self.ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                raise (cause if isinstance(cause, MemvecError) else error) from None
        raise MemvecError(f"workers die at start: {reason[-1] if reason else 'no reason given'}")

    def share(self, waiting: int, batch_size: int) -> int:
        """Passages for a unit: enough to refill slots, few enough that all have some to the end."""
        share = -(-waiting // (2 * self.count))
        return max(1, min(REFILLS * batch_size, share))

    def stream(
        self, next_unit: Callable[[], Unit | None], on_progress: OnProgress
    ) -> Iterator[Any]:
        """Results of all units, as they come.

        `next_unit` is asked whenever a worker is free, and says None while there is nothing to do;
        the stream ends when it says so and nobody is at work.
        """
        returned, deaths = deque[Unit](), 0
        while True:
            for i in range(len(self.batch_size)):
                if self.batch_size[i].unit is not None:
                    continue
                unit = returned.popleft() if returned else next_unit()
                if unit is None:
                    continue
                slot = self.batch_size[i]  # asking for the unit may have replaced a dead worker
                slot.unit, slot.got = unit, set()
                slot.results = slot.actor.stream.options(num_returns="streaming").remote(unit)
            busy = [slot for slot in self.batch_size if slot.unit is not None]
            if not busy:
                return
            ready, _ = self.ray.wait([s.results for s in busy], num_returns=1, timeout=TELL_EVERY)
            if on_progress is not None and (news := self._news()) is not None:
                on_progress(news)
            for slot in [s for s in busy if any(s.results is r for r in ready)]:
                try:
                    key, result = self.ray.get(next(slot.results))
                except StopIteration:
                    # The stream of a killed worker may end without an error: count what came.
                    left = _rest(slot)
                    slot.unit = None
                    if left is not None:
                        returned.append(left)
                        deaths += 1
                        self._give_up(deaths, "its stream ended early")
                        self._replace(slot)
                except self.ray.exceptions.RayActorError as error:
                    deaths += 1
                    left = _rest(slot)
                    self._give_up(deaths, str(error).strip().splitlines()[0])
                    if left is not None:
                        returned.append(left)
                    self._replace(slot)
                except self.ray.exceptions.RayTaskError as error:
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, MemvecError) else error) from None
                else:
                    slot.got.add(key)
                    yield result

    def close(self) -> None:
        """Let the actors go; a cluster that was there before stays."""
        for slot in self.batch_size:
            self.ray.kill(slot.actor)
        self.batch_size = []
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
            self.news = None  # the run goes on without news
            return None
        self._asked = None
        names = [slot.name for slot in self.batch_size if slot.unit is not None]
        return together([latest[name] for name in names if name in latest])

    def _give_up(self, deaths: int, reason: str) -> None:
        if deaths > MOST_DEATHS * self.count:
            raise MemvecError(
                f"{deaths} workers died, the last one with: {reason}; what is done is kept, the "
                "same command goes on."
            )

    def _hire(self) -> _Slot:
        self._made += 1
        name = f"ray-{self._made}"
        remote = self.ray.remote(max_restarts=0, num_gpus=int(self.gpu), num_cpus=1)(Worker)
        made = remote.remote(self.loading, self.device, self.threads, name, self.news)
        return _Slot(name, made)

    def _replace(self, slot: _Slot) -> None:
        self.batch_size[self.batch_size.index(slot)] = self._hire()


def together(told: list[Progress]) -> Progress | None:
    """Several workers' progress as one: sums, and the mean horizon over all their slots."""
    in_slots = sum(p.in_slots for p in told)
    if not in_slots:
        return None
    return Progress(
        in_slots,
        sum(p.waiting for p in told),
        sum(p.horizon * p.in_slots for p in told) / in_slots,
        sum(p.steps for p in told),
        sum(p.tokens for p in told),
        sum(p.seconds for p in told),
    )


def _rest(slot: _Slot) -> Unit | None:
    """What a dead worker leaves: its unit without what has come."""
    assert slot.unit is not None
    return slot.unit.without(slot.got) if slot.unit.keys() - slot.got else None


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


# ------------------------------------------------------------------ a document's passages


@dataclass(frozen=True)
class Batch:
    """Passages of documents for one worker, and how to cram them."""

    passages: tuple[Passage, ...]
    recipe: Recipe
    vectors: int
    batch_size: int
    storage: str
    layout: str

    def keys(self) -> set[Hashable]:
        """Where the passages stand."""
        return {(p.document, p.offset) for p in self.passages}

    def without(self, done: set[Hashable]) -> Batch:
        """The rest of it."""
        left = tuple(p for p in self.passages if (p.document, p.offset) not in done)
        return replace(self, passages=left)

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, Outcome]]:
        """Outcomes, each as soon as it is certified."""
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
    """Many engines behind `push` and `run` of one: what waits goes to the worker that is free."""

    def __init__(self, workers: Workers, batch: Batch, on_progress: OnProgress = None) -> None:
        self.workers, self.batch, self.on_progress = workers, batch, on_progress
        self.waiting = Waiting()

    def push(self, passage: Passage) -> None:
        """Add a passage, also while `run` is under way."""
        self.waiting.push(Job(passage, self.batch.recipe.margin))

    def run(self, passages: Iterable[Passage] = ()) -> Iterator[Outcome]:
        """Cram everything that waits; yields each outcome as soon as it comes."""
        for passage in passages:
            self.push(passage)
        yield from self.workers.stream(self._next, self.on_progress)

    def _next(self) -> Batch | None:
        """A share of what waits, longest first."""
        n = min(len(self.waiting), self.workers.share(len(self.waiting), self.batch.batch_size))
        if not n:
            return None
        return replace(self.batch, passages=tuple(self.waiting.pop().passage for _ in range(n)))
