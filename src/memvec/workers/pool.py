"""The driver's side: hands out units, collects results, and replaces workers that died."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memvec.cramming.batch import Progress
from memvec.errors import MemvecError, SlowPathWarning, check_minimum
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.model.memory import out_of_memory
from memvec.progress_board import ProgressBoard
from memvec.workers.actor import REPORT_EVERY, Loading, OnProgress, Unit, Worker

MAX_DEATHS = 3  # mean per worker; with more, the run ends
REFILLS = 4  # a unit has at most this many passages per slot
STARTUP_SECONDS = 180  # for a Ray node; Ray's own limit of 30 is too short on a busy machine


@dataclass
class Member:
    """An actor with its current unit, Ray's stream of results, and the keys received so far."""

    name: str
    actor: Any
    unit: Unit | None = None
    results: Any = None
    received: set[Hashable] = field(default_factory=set)

    def start(self, unit: Unit) -> None:
        """Make the actor work on a unit."""
        self.unit, self.received = unit, set()
        self.results = self.actor.stream.options(num_returns="streaming").remote(unit)

    def unfinished(self) -> Unit | None:
        """Its unit without the items whose results arrived; None if all did."""
        assert self.unit is not None
        left = self.unit.keys() - self.received
        return self.unit.without(self.received) if left else None


class Workers:
    """`workers` actors on this machine, or on the Ray cluster at `address`.

    If this process is connected to a Ray already (`ray.init`), that one is used, and `address` is
    not read. With `workers` 0 there is one per GPU, or one per CPU without GPUs. A Ray that is
    started here gives each worker a CPU, whatever their number. Raises MemvecError if Ray is not
    installed or does not start, for more workers than CPUs of a Ray that ran before, for more than
    GPUs, for a negative number, and for one numbered GPU.
    """

    def __init__(
        self,
        loading: Loading,
        *,
        workers: int = 0,
        address: str | None = None,
        device: str = "auto",
    ) -> None:
        check_minimum(0, workers=workers)
        if device.startswith("cuda:"):
            raise MemvecError(
                f"{device} is one GPU, and each worker has its own: use the device 'cuda'."
            )
        self.ray = _start_ray(workers, address)
        resources = self.ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if device in ("auto", "cuda") else 0
        cpus = max(1, int(resources.get("CPU", 1)))
        self.count = workers or gpus or cpus
        if self.count > cpus:  # Ray would wait for the last of them for ever, without an error
            raise MemvecError(
                f"{self.count} workers need as many CPUs, and Ray has {cpus} here: ask for fewer "
                "workers, or in Python call ray.shutdown() first."
            )
        if 0 < gpus < self.count:
            raise MemvecError(
                f"{self.count} workers need a GPU each, and Ray has {gpus} here: ask for fewer "
                "workers, or for the device 'cpu'."
            )
        self.loading, self.gpu = loading, gpus > 0
        # By name, so that a worker whose torch cannot use its GPU does not compute on the CPU.
        self.device = "cuda" if self.gpu else device
        # torch's number respects affinity and OMP_NUM_THREADS.
        self.threads = 0 if self.gpu else max(1, torch.get_num_threads() // self.count)
        self._hired = 0
        self.board = self.ray.remote(num_cpus=0)(ProgressBoard).remote()
        self._board_request: Any = None
        self.members = [self._hire() for _ in range(self.count)]

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(lm, *args)` of an idle worker, at most three attempts if workers die.

        Raises MemvecError if the worker does, after the last attempt, or if the workers are closed.
        """
        self._check_open()
        reason = ""
        for _ in range(MAX_DEATHS):
            member = next((m for m in self.members if m.unit is None), self.members[0])
            try:
                return self.ray.get(member.actor.call.remote(function, *args))
            except self.ray.exceptions.RayActorError as error:
                reason = _why_it_died(error)
                if member.unit is None:
                    self._replace(member)
            except self.ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
        raise MemvecError(f"workers die at start: {reason or 'no reason given'}")

    def check_model(self, lm: FrozenLM) -> None:
        """Raises MemvecError if the workers' model has other weights or another dtype than `lm`.

        The file names the dtype of `lm`, so a certificate of another one would be wrong.
        """
        theirs, ours = self.call(_fingerprint), lm.fingerprint
        if not theirs.matches(ours):
            raise MemvecError(
                f"the workers loaded {self.loading.name}, which has other weights than {lm.name}: "
                "give both the same model."
            )
        if theirs.dtype != ours.dtype:
            raise MemvecError(
                f"the workers loaded {self.loading.name} in {theirs.dtype}, and {lm.name} is in "
                f"{ours.dtype}: give both the same dtype."
            )

    def share(self, waiting: int, batch_size: int) -> int:
        """Number of passages for the next unit, at least 1.

        Enough to refill slots, and few enough that all workers finish at about the same time. On
        GPUs it fills the slots if it can: a step of few slots takes nearly as long as one of all.
        """
        share = -(-waiting // (2 * self.count))
        if self.gpu:
            share = max(share, min(batch_size, -(-waiting // self.count)))
        return max(1, min(REFILLS * batch_size, share))

    def stream(
        self, next_unit: Callable[[], Unit | None], on_progress: OnProgress
    ) -> Iterator[Any]:
        """Yields the results of all units, each as soon as it arrives.

        `next_unit` is called whenever a worker is free, and returns None while there is no work.
        The stream ends when it returns None and every worker is idle. A worker whose GPU fails is
        replaced like a dead one. Raises MemvecError if a worker does, after more than three deaths
        per worker on average, and if the workers are closed or at work for another stream.
        """
        self._check_open()
        if any(member.unit is not None for member in self.members):  # its rows are of other work
            raise MemvecError(
                "the workers are at work for a call that did not end: close them and make new ones."
            )
        returned, deaths = deque[Unit](), 0
        while True:
            self._hand_out(returned, next_unit)
            busy = [m for m in self.members if m.unit is not None]
            if not busy:
                return
            ready, _ = self.ray.wait([m.results for m in busy], num_returns=1, timeout=REPORT_EVERY)
            if on_progress is not None and (progress := self._progress()) is not None:
                on_progress(progress)
            for member in [m for m in busy if any(m.results is r for r in ready)]:
                try:
                    key, result = self.ray.get(next(member.results))
                except StopIteration:
                    # The stream of a killed worker may end without an error, so check the keys.
                    if member.unfinished() is None:
                        member.unit = None
                        continue
                    deaths += 1
                    self._bury(member, deaths, "its stream ended early", returned)
                except self.ray.exceptions.RayActorError as error:
                    deaths += 1
                    self._bury(member, deaths, _why_it_died(error), returned)
                except self.ray.exceptions.RayTaskError as error:
                    if not (reason := _device_fault(error)):
                        raise _cause(error) from None
                    self.ray.kill(member.actor)  # its process can use the GPU no more
                    deaths += 1
                    self._bury(member, deaths, reason, returned)
                else:
                    member.received.add(key)
                    yield result

    def close(self) -> None:
        """Kill the actors; Ray itself keeps running."""
        for member in self.members:
            self.ray.kill(member.actor)
        self.members = []
        if self.board is not None:
            self.ray.kill(self.board)

    # ------------------------------------------------------------------ inside

    def _check_open(self) -> None:
        if not self.members:
            raise MemvecError("the workers are closed: make new ones.")

    def _hand_out(self, returned: deque[Unit], next_unit: Callable[[], Unit | None]) -> None:
        """Give every idle worker a unit: first those that dead workers left, then new ones."""
        for i in range(len(self.members)):
            if self.members[i].unit is not None:
                continue
            unit = returned.popleft() if returned else next_unit()
            if unit is not None:
                self.members[i].start(unit)  # making the unit may have replaced a dead worker

    def _bury(self, member: Member, deaths: int, reason: str, returned: deque[Unit]) -> None:
        """Replace a dead worker and put the rest of its unit back.

        Raises MemvecError if too many died.
        """
        if deaths > MAX_DEATHS * self.count:
            raise MemvecError(
                f"{deaths} workers died, the last one with: {reason}; what is done is kept, the "
                "same command goes on."
            )
        warnings.warn(
            f"a worker died ({reason.rstrip('.')}): another one takes its place and does what is "
            f"left of its work; {deaths} of at most {MAX_DEATHS * self.count} deaths.",
            SlowPathWarning,
            stacklevel=3,
        )
        unfinished = member.unfinished()
        if unfinished is not None:
            returned.append(unfinished)
        self._replace(member)

    def _progress(self) -> Progress | None:
        """The combined last progress of all busy workers; None if no new one has arrived."""
        if self.board is None:
            return None
        if self._board_request is None:
            self._board_request = self.board.all.remote()
        try:
            ready, _ = self.ray.wait([self._board_request], timeout=0)
            if not ready:
                return None
            latest: dict[str, dict[str, Any]] = self.ray.get(self._board_request)
        except self.ray.exceptions.RayActorError:
            self.board = None  # the run goes on without its progress
            return None
        self._board_request = None
        names = [member.name for member in self.members if member.unit is not None]
        return combined([Progress(**latest[name]) for name in names if name in latest])

    def _hire(self) -> Member:
        self._hired += 1
        name = f"ray-{self._hired}"
        remote = self.ray.remote(max_restarts=0, num_gpus=int(self.gpu), num_cpus=1)(Worker)
        actor = remote.remote(self.loading, self.device, self.threads, name, self.board)
        return Member(name, actor)

    def _replace(self, member: Member) -> None:
        self.members[self.members.index(member)] = self._hire()


def _fingerprint(lm: FrozenLM) -> Fingerprint:
    return lm.fingerprint


def combined(progresses: Sequence[Progress]) -> Progress | None:
    """The progress of several workers as one: sums, and the mean horizon over all slots.

    None if no slot is taken.
    """
    in_slots = sum(p.in_slots for p in progresses)
    if not in_slots:
        return None
    return Progress(
        in_slots,
        sum(p.waiting for p in progresses),
        sum(p.horizon * p.in_slots for p in progresses) / in_slots,
        steps=sum(p.steps for p in progresses),
        tokens=sum(p.tokens for p in progresses),
        seconds=sum(p.seconds for p in progresses),
    )


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def _why_it_died(error: Any) -> str:
    """The last line of Ray's message; the first one only says that an actor died.

    Raises MemvecError with it if the actor could not be made: its successor could not be, either.
    """
    reason = _lines(error)[-1].strip()
    if getattr(error, "actor_init_failed", False):
        raise MemvecError(f"a worker cannot begin: {reason.split('MemvecError: ')[-1]}")
    return reason


def _device_fault(error: Any) -> str:
    """The CUDA error that a worker raised, after which its process must end; '' for another error.

    Lack of memory is none: the engine handles it.
    """
    fault = next((line for line in reversed(_lines(error)) if "CUDA error: " in line), "")
    return "" if out_of_memory(RuntimeError(fault)) else fault[fault.find("CUDA error: ") :].strip()


def _cause(error: Any) -> BaseException:
    """The MemvecError that a worker raised, else Ray's own error."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, MemvecError) else error


def _start_ray(workers: int, address: str | None) -> Any:
    """The module `ray`, connected to a cluster or to a Ray that this call starts here."""
    try:
        import ray
    except ImportError:
        raise MemvecError("workers need Ray: pip install '.[ray]' in the repository.") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(STARTUP_SECONDS))
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(
                address="local",  # else Ray joins a cluster that RAY_ADDRESS or `ray start` names
                num_cpus=workers or None,  # None: Ray counts them
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=200 * 2**20,
            )
    except Exception as error:  # Ray reports "the node timed out during startup" with a bare one
        place = address or "this machine"
        raise MemvecError(f"Ray at {place} does not start: {_lines(error)[0]}") from error
    return ray
