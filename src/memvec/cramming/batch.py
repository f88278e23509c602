"""The running batch: one row of tensors for each slot, and the passages that wait for a slot.

A passage is a `Job` while it waits and a row of `BatchState` while it is in a slot. Rows are added
when a slot is filled, dropped when a passage is done, and halved when memory runs out.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.certify import Finished, Outcome
from memvec.cramming.rows import Rows
from memvec.cramming.schedules import ScheduleState
from memvec.errors import MemvecError
from memvec.passages.passage import Passage
from memvec.results import Status

# Of the logits' spread: the margin after a failed certification from margin 0.
SMALLEST_RAISE = 0.05


@dataclass
class Job:
    """A passage that waits, is in a slot, or has left it, with what it has cost so far.

    `min_mem_bits` is as in `Finished`, `seconds` its share of the wall time of the batch.
    """

    passage: Passage
    margin: float  # that certification requires, logits
    vectors: Float[Tensor, "K D"] | None = None  # None: begin from the recipe's start
    _: KW_ONLY
    steps: int = 0
    spent: int = 0  # forward-backward tokens
    min_mem_bits: float = math.inf
    seconds: float = 0.0

    @classmethod
    def again(cls, outcome: Outcome, *, raised: float | None = None) -> Job:
        """A job that continues from an outcome's vectors.

        `raised` is the model's logit spread if the margin is to rise: to twice the old margin, and
        to at least SMALLEST_RAISE spreads. None: the margin stays.
        """
        margin = outcome.margin_asked
        if raised is not None:
            margin = max(2 * margin, SMALLEST_RAISE * raised)
        return cls(outcome.passage, margin, outcome.vectors.float(), **_costs(outcome))

    def finished(self, vectors: Float[Tensor, "K D"], status: Status) -> Finished:
        """The end of this job, with the vectors (K, D) as they will be stored."""
        return Finished(self.passage, vectors, status, self.margin, **_costs(self))


def _costs(of: Job | Outcome) -> dict[str, Any]:
    """The costs so far by name: a job and an outcome have the same four."""
    return {name: getattr(of, name) for name in ("steps", "spent", "min_mem_bits", "seconds")}


def refuse_for_memory(jobs: Sequence[Job], device: torch.device) -> NoReturn:
    """Raise MemvecError: a single one of these passages does not fit in memory."""
    longest = max((len(job.passage) for job in jobs), default=0)
    raise MemvecError(
        f"one passage of {longest} tokens does not fit in the memory of {device}: "
        "cram shorter passages, or load the model with checkpointing=True."
    )


class Waiting:
    """Waiting jobs, longest first, so that neighbours have similar lengths."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Job]] = []
        self._order = itertools.count()

    def push(self, job: Job) -> None:
        """Add a job."""
        heapq.heappush(self._heap, (-len(job.passage), next(self._order), job))

    def pop(self) -> Job:
        """Take the longest one, the earliest of equals."""
        return heapq.heappop(self._heap)[-1]

    def jobs(self) -> list[Job]:
        """All of them, in no order."""
        return [job for *_, job in self._heap]

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(frozen=True)
class Progress:
    """The state of the running batch, for a progress display."""

    in_slots: int
    waiting: int
    horizon: float  # mean leading right tokens over the slots
    _: KW_ONLY
    steps: int  # engine steps so far
    tokens: int  # forward-backward tokens so far
    seconds: float = 0.0  # in engine steps so far; filling slots and certifying not counted


@dataclass
class BatchState(Rows):
    """Everything about the passages in the slots. B slots, K vectors, T columns, D width."""

    ids: Int[Tensor, "B T"]  # token ids, right-padded with 0
    length: Int[Tensor, " B"]  # tokens to predict
    room: Int[Tensor, " B"]  # columns of a passage until the slots are filled again
    corrections: Int[Tensor, " B"]  # tokens that may be missed: they will be listed
    margin_asked: Float[Tensor, " B"]  # margin that certification requires, logits
    target_margin: Float[Tensor, " B"]  # the same, raised where steps run in another dtype
    parameters: Tensor  # (B, ...): what the optimiser moves
    vectors: Float[Tensor, "B K D"]  # the best measured so far, as they will be stored
    steps: Int[Tensor, " B"]
    spent: Int[Tensor, " B"]  # forward-backward tokens
    min_mem_bits: Float[Tensor, " B"]  # of the whole passage, over all steps; inf: not measured
    done: Bool[Tensor, " B"]  # every margin is met
    failed: Bool[Tensor, " B"]  # the loss was not finite
    stopped: Bool[Tensor, " B"]  # done, failed or out of budget: the slot can be freed
    term_mean: Float[Tensor, " B"]  # running mean of the second term's loss
    term_mean_of_best: Float[Tensor, " B"]  # the same at the step that gave the kept vectors
    schedule: ScheduleState
    optimizer: Rows  # the optimizer's own state
    term: Rows  # the second term's own state

    def __post_init__(self) -> None:
        for kind in ("schedule", "optimizer", "term"):
            kept, B = getattr(self, kind), len(self.length)
            if not isinstance(kept, Rows) or not kept.whole(B):
                raise MemvecError(
                    f"the {kind} keeps {type(kept).__name__} of its {B} passages: a dataclass "
                    "derived from Rows is needed, with a row for each in every field and no more."
                )

    @property
    def columns(self) -> int:
        """Columns of `ids`: tokens of the longest passage since the batch was filled."""
        return self.ids.shape[1]

    def status(self, row: int) -> Status:
        """How the passage in a row has stopped."""
        if self.done[row]:
            return "done"
        return "not-finite" if self.failed[row] else "budget"

    def write_progress(self, row: int, job: Job) -> None:
        """Write the best vectors that were measured in a row, and what they cost, into its job."""
        job.vectors = self.vectors[row].cpu().clone()
        job.steps, job.spent = int(self.steps[row]), int(self.spent[row])
        job.min_mem_bits = float(self.min_mem_bits[row])

    def widen(self, columns: int) -> None:
        """Room for passages of `columns` tokens."""
        if columns > self.columns:
            self.ids = torch.nn.functional.pad(self.ids, (0, columns - self.columns))
