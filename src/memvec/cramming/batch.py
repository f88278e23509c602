"""The running batch: one row of tensors for each slot, and the passages that wait for a slot.

A passage is a `Job` while it waits and a row of `BatchState` while it is in a slot. A row is added
when a slot is filled, and removed when its passage is done. Half of the rows are removed when
memory runs out.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.outcomes import Finished, Outcome
from memvec.cramming.rows import Rows
from memvec.cramming.schedules import ScheduleState
from memvec.errors import MemvecError
from memvec.passages.passage import Passage
from memvec.results import Status

SMALLEST_RAISE = 0.05  # minimum margin after a failed certification, in logit spreads


@dataclass
class Job:
    """A passage that waits or is in a slot, with its costs so far.

    `min_mem_bits` is defined in `Finished`; `seconds` is the passage's share of the wall time.
    """

    passage: Passage
    margin: float  # margin that certification requires, logits
    vectors: Float[Tensor, "K D"] | None = None  # first vectors; None: those of the recipe's start
    _: KW_ONLY
    steps: int = 0
    spent: int = 0  # forward-backward tokens
    min_mem_bits: float = math.inf
    seconds: float = 0.0

    @classmethod
    def from_outcome(cls, outcome: Outcome) -> Job:
        """A job that continues from an outcome's vectors, at the same margin."""
        vectors = outcome.vectors.float()
        return cls(outcome.passage, outcome.margin_asked, vectors, **_costs(outcome))

    @classmethod
    def with_raised_margin(cls, outcome: Outcome, logit_spread: float) -> Job:
        """The same at twice the margin, and at SMALLEST_RAISE spreads or more (`logit_spread`)."""
        margin = max(2 * outcome.margin_asked, SMALLEST_RAISE * logit_spread)
        return replace(cls.from_outcome(outcome), margin=margin)

    def finished(self, status: Status) -> Finished:
        """The passage with the job's vectors, which must be rounded as they will be stored."""
        assert self.vectors is not None, "a passage is not finished before it was measured"
        return Finished(self.passage, self.vectors, status, self.margin, **_costs(self))


def _costs(passage: Job | Outcome) -> dict[str, Any]:
    """The costs of a passage so far, by the names of the fields."""
    return {name: getattr(passage, name) for name in ("steps", "spent", "min_mem_bits", "seconds")}


def refuse_for_memory(jobs: Sequence[Job], device: torch.device) -> NoReturn:
    """Raise MemvecError, which says that one passage alone does not fit in memory."""
    longest = max((len(job.passage) for job in jobs), default=0)
    raise MemvecError(
        f"one passage of {longest} tokens does not fit in the memory of {device}: "
        "cram shorter passages, or load the model with checkpointing=True."
    )


class Waiting:
    """A queue of jobs, longest passage first, so that passages in slots have similar lengths."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Job]] = []
        self._order = itertools.count()

    def push(self, job: Job) -> None:
        """Add a job."""
        heapq.heappush(self._heap, (-len(job.passage), next(self._order), job))

    def pop(self) -> Job:
        """Remove and return the job with the longest passage; of equal ones, the earliest."""
        return heapq.heappop(self._heap)[-1]

    def jobs(self) -> list[Job]:
        """All waiting jobs, in no particular order."""
        return [job for *_, job in self._heap]

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(frozen=True)
class Progress:
    """The state of the running batch, for a progress display."""

    in_slots: int
    waiting: int
    horizon: float  # mean number of leading right tokens over the slots
    _: KW_ONLY
    steps: int  # engine steps so far
    tokens: int  # forward-backward tokens so far
    seconds: float = 0.0  # wall time of the engine steps so far, without filling and certifying


@dataclass
class BatchState(Rows):
    """The state of the passages in the slots. B slots, K vectors, T columns, D width."""

    ids: Int[Tensor, "B T"]  # token ids, right-padded with 0
    length: Int[Tensor, " B"]  # tokens to predict
    room: Int[Tensor, " B"]  # maximum number of columns of a passage until the next fill
    corrections: Int[Tensor, " B"]  # tokens that the vectors may miss and the file then lists
    margin_asked: Float[Tensor, " B"]  # margin that certification requires, logits
    target_margin: Float[Tensor, " B"]  # margin of the steps; larger if their dtype is another
    parameters: Tensor  # (B, ...): what the optimiser moves
    vectors: Float[Tensor, "B K D"]  # the best measured so far, as they will be stored
    steps: Int[Tensor, " B"]
    spent: Int[Tensor, " B"]  # forward-backward tokens
    min_mem_bits: Float[Tensor, " B"]  # minimum H_mem of the passage; inf: not measured
    done: Bool[Tensor, " B"]  # every margin is met
    failed: Bool[Tensor, " B"]  # the loss was not finite
    stopped: Bool[Tensor, " B"]  # done, failed or out of budget: the slot can be freed
    term_mean: Float[Tensor, " B"]  # running mean of the second loss
    term_mean_of_best: Float[Tensor, " B"]  # `term_mean` at the step of the best vectors
    schedule: ScheduleState
    optimizer: Rows  # the optimizer's own state
    term: Rows  # the state of the second loss

    def __post_init__(self) -> None:
        for kind in ("schedule", "optimizer", "term"):
            state, B = getattr(self, kind), len(self.length)
            if not isinstance(state, Rows) or not state.is_complete(B):
                raise MemvecError(
                    f"the {kind} keeps {type(state).__name__} of its {B} passages: a dataclass "
                    "derived from Rows is needed, with a row for each in every field and no more."
                )

    @property
    def columns(self) -> int:
        """Columns of `ids`: tokens of the longest passage that these slots have held."""
        return self.ids.shape[1]

    def status(self, row: int) -> Status:
        """The reason why the passage in a row has stopped."""
        if self.done[row]:
            return "done"
        return "not-finite" if self.failed[row] else "budget"

    def write_progress(self, row: int, job: Job) -> None:
        """Copy the best measured vectors of a row, and its costs, into its job."""
        job.vectors = self.vectors[row].cpu().clone()
        job.steps, job.spent = int(self.steps[row]), int(self.spent[row])
        job.min_mem_bits = float(self.min_mem_bits[row])

    def widen(self, columns: int) -> None:
        """Pad `ids` to `columns` columns, if it has fewer."""
        if columns > self.columns:
            self.ids = torch.nn.functional.pad(self.ids, (0, columns - self.columns))
