"""Cram all passages of a file together, with one shared m: P passages have P + 1 vectors.

In Mezentsev & Oseledets (section 4.3), texts share m, and each has its own e. For half of the
vectors, their Llama models hold half of the tokens, and Pythia a fifth to a half. Only here do
passages depend on each other. All of them move m, so each e depends on every passage of the file,
and no passage is finished before all are. The record says so (`layout` 'one-step-shared'). An
interrupted run starts from the beginning, and another passage changes every vector.

All passages move in every step, `batch_size` of them in a forward pass; the gradient at m is the
sum over all. Cramming ends when all margins of all passages are met in one step, or by the recipe's
steps, patience and budget. The vectors of the step with the largest number of leading right tokens
are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import registry
from memvec.cramming.batch import Job, Progress
from memvec.cramming.coordinates import as_stored
from memvec.cramming.objectives import objective_named, score
from memvec.cramming.optimizers import Adam, OptimizerState
from memvec.cramming.outcomes import Finished, Outcome, outcomes_of
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import Schedule
from memvec.cramming.starts import resolve_start_rule, start_vectors
from memvec.errors import MemvecError
from memvec.graphs import whole_columns
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.model.memory import forget_freed_memory, out_of_memory
from memvec.passages.passage import padded_ids
from memvec.results import Status
from memvec.storage import Storage, storage_of

Value = TypeVar("Value")
Result = TypeVar("Result")

RAISES = 4  # maximum number of times that margins are raised when decoding disagrees with them


def for_shared_m(recipe: Recipe) -> Recipe:
    """The recipe with the fields that a shared m cannot use at their neutral values, for records.

    The model itself computes the steps. No passage has its own enlargement, temperature or
    look-ahead, because all share m.
    """
    return replace(recipe, compute="model", lr_large=0.0, stuck_after=0, narrow_after=0, settle=0)


@dataclass
class Pair(Generic[Value]):
    """A value for the e of all P passages, and one for the m that they share."""

    e: Value
    m: Value

    def map(self, function: Callable[[Value], Result]) -> Pair[Result]:
        """A function applied to both values."""
        return Pair(function(self.e), function(self.m))


Tensors = Pair[Tensor]  # e (P, 1, D) and m (1, 1, D)


@dataclass(frozen=True)
class Task:
    """The tokens of P passages, and the margins that they must reach."""

    ids: Int[Tensor, "P T"]
    length: Int[Tensor, " P"]
    margin: Float[Tensor, " P"]  # margin that certification requires, logits

    @classmethod
    def of(cls, jobs: Sequence[Job], device: torch.device) -> Task:
        """The task of the passages of some jobs."""
        lengths = [len(job.passage) for job in jobs]
        ids = padded_ids([job.passage for job in jobs], max(lengths)).to(device)
        margin = torch.tensor([job.margin for job in jobs], device=device)
        return cls(ids, torch.tensor(lengths, device=device), margin)

    def __getitem__(self, rows: Tensor) -> Task:
        return Task(self.ids[rows], self.length[rows], self.margin[rows])


@dataclass(frozen=True)
class Measurement:
    """The results of one pass over n passages: all, or a group of them."""

    leading: Int[Tensor, " n"]  # leading right tokens
    counted: Int[Tensor, " n"]  # tokens that count in the loss
    gradient: Tensors  # at the e of these passages, and their part of the gradient at m
    finite: bool  # the loss is finite


@dataclass
class Best:
    """The vectors of the best step so far, which has the most leading right tokens."""

    vectors: Tensors
    leading: Int[Tensor, " P"]  # largest number of leading right tokens of each passage so far
    total: int = -1  # leading right tokens of all passages in the best step
    stale: int = 0  # steps since the best step

    def update(self, vectors: Tensors, leading: Int[Tensor, " P"]) -> None:
        """Record a step; its vectors are kept if it is the best so far."""
        self.leading = torch.maximum(self.leading, leading)
        if (total := int(leading.sum())) > self.total:
            self.vectors, self.total, self.stale = vectors.map(torch.clone), total, 0
        else:
            self.stale += 1


class Shared:
    """Crams passages into one e each and a shared m.

    Raises MemvecError for a recipe with coordinates, corrections or a start rule that this cannot
    use.
    """

    def __init__(
        self,
        lm: FrozenLM,
        recipe: Recipe,
        *,
        batch_size: int,
        storage: str | torch.dtype | Storage,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        recipe = recipe.in_logits(lm.logit_spread).for_family(lm.config.model_type)
        if recipe.coordinates != "direct":
            raise MemvecError("a shared m is moved directly: leave out the coordinates.")
        resolve_start_rule(lm, recipe)
        if recipe.corrections:
            raise MemvecError("a shared m takes no corrections: leave them out.")
        self.lm, self.recipe, self.batch_size = lm, recipe, batch_size
        # A passage has one vector of its own, so K is 1 for the schedule.
        self.schedule: Schedule = registry.made("schedule", recipe.schedule, recipe, 1)
        self.optimizer: Adam = registry.made("optimizer", recipe.optimizer, recipe)
        self.objective = objective_named(recipe.objective)
        self.storage = storage_of(storage)
        self.on_progress = on_progress
        self.steps = self.tokens = 0

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Cram the jobs' passages together; returns outcomes in the order of the jobs.

        There must be at least one job. A job with vectors continues from them. When memory runs
        out, all jobs start again with half as many passages in a forward pass. Raises MemvecError
        if a single passage does not fit in memory.
        """
        while True:
            try:
                return self._run(list(jobs))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if self.batch_size == 1:
                longest = max(len(job.passage) for job in jobs)
                raise MemvecError(
                    f"one passage of {longest} tokens does not fit in the memory of "
                    f"{self.lm.device}: cram shorter passages."
                )
            self.batch_size = min(self.batch_size, len(jobs)) // 2 or 1
            forget_freed_memory()

    def _run(self, jobs: list[Job]) -> list[Outcome]:
        spread, before = self.lm.logit_spread, jobs[0].steps
        for raises in range(RAISES + 1):
            finished = self._cram(jobs, self.recipe.steps - (jobs[0].steps - before))
            outcomes = [
                outcome
                for at in range(0, len(finished), self.batch_size)
                for outcome in outcomes_of(
                    self.lm, finished[at : at + self.batch_size], "vectors", self.storage
                )
            ]
            disagreeing = [i for i, o in enumerate(outcomes) if o.status == "done" and not o.exact]
            out_of_steps = outcomes[0].steps - before >= self.recipe.steps
            may_not_retry = out_of_steps or raises == RAISES or self.recipe.if_not_exact == "stop"
            if not disagreeing or may_not_retry:
                break
            jobs = [
                Job.with_raised_margin(o, spread) if i in disagreeing else Job.from_outcome(o)
                for i, o in enumerate(outcomes)
            ]
        return outcomes

    def _cram(self, jobs: list[Job], max_steps: int) -> list[Finished]:
        """Move all passages until every margin is met, for at most `max_steps` steps."""
        began = time.perf_counter()
        task = Task.of(jobs, self.lm.device)
        longest_first = task.length.argsort(descending=True, stable=True)
        groups = torch.split(longest_first, self.batch_size)
        vectors = self._start(jobs).map(lambda rows: rows.to(self.lm.device))
        moments = vectors.map(self.optimizer.fresh)
        best = Best(vectors.map(torch.clone), torch.zeros_like(task.length))
        spent = torch.tensor([job.spent for job in jobs], device=self.lm.device)
        steps = 0
        while True:
            measured = self._measure_all(groups, vectors, task, best.leading)
            best.update(vectors, measured.leading)
            self._report(measured.leading, len(jobs))
            status = self._status(measured, task)
            over_budget = bool(self.recipe.budget) and int(spent.max()) >= self.recipe.budget
            given_up = steps >= max_steps or best.stale >= self.recipe.patience or over_budget
            if status != "budget" or given_up:
                break
            self._move(vectors, measured.gradient, moments)
            steps += 1
            spent += measured.counted
            self.steps += 1
            self.tokens += int(measured.counted.sum())
        e, m = best.vectors.e, best.vectors.m.expand(len(jobs), -1, -1)
        stored = as_stored(torch.cat([e, m], dim=1), self.storage).cpu()
        seconds = (time.perf_counter() - began) / len(jobs)
        finished = []
        for job, rows, cost in zip(jobs, stored, spent.tolist(), strict=True):
            costs = {"steps": job.steps + steps, "spent": cost, "seconds": job.seconds + seconds}
            finished.append(replace(job, vectors=rows.clone(), **costs).finished(status))
        return finished

    def _status(self, measured: Measurement, task: Task) -> Status:
        """The status if cramming stops after this step; 'budget' if it may continue."""
        if not measured.finite:
            return "not-finite"
        return "done" if bool((measured.leading == task.length).all()) else "budget"

    def _move(self, vectors: Tensors, gradient: Tensors, moments: Pair[OptimizerState]) -> None:
        """One step of every e and of m, in place."""
        moves = ((vectors.e, gradient.e, moments.e), (vectors.m, gradient.m, moments.m))
        for parameters, slope, state in moves:
            moving = torch.ones(len(parameters), dtype=torch.bool, device=parameters.device)
            self.optimizer.step(parameters, slope, state, moving)

    def _start(self, jobs: list[Job]) -> Tensors:
        """The first e of each passage and the first m, whose seed derives from all token ids."""
        new = [job for job in jobs if job.vectors is None]
        starts = iter(start_vectors(self.lm, [job.passage.ids for job in new], 2, self.recipe))
        rows = [next(starts) if job.vectors is None else job.vectors for job in jobs]
        crammed = [job.vectors for job in jobs if job.vectors is not None]
        if crammed:
            shared = crammed[0]
        else:
            every = [token for job in jobs for token in job.passage.ids]
            shared = start_vectors(self.lm, [every], 2, self.recipe)[0]
        e = torch.stack([row[:1] for row in rows]).float()
        return Pair(e, shared[None, 1:].float().clone())

    def _measure_all(
        self, groups: Sequence[Tensor], vectors: Tensors, task: Task, best: Int[Tensor, " P"]
    ) -> Measurement:
        """Measure all passages, one group of rows at a time; gradients at m are summed."""
        leading, counted = torch.zeros_like(task.length), torch.zeros_like(task.length)
        gradient, finite = vectors.map(torch.zeros_like), True
        for rows in groups:
            group = self._measure(Pair(vectors.e[rows], vectors.m.clone()), task[rows], best[rows])
            leading[rows], counted[rows] = group.leading, group.counted
            gradient.e[rows] = group.gradient.e
            gradient.m += group.gradient.m
            finite = finite and group.finite
        return Measurement(leading, counted, gradient, finite)

    def _measure(self, vectors: Tensors, task: Task, best: Int[Tensor, " n"]) -> Measurement:
        """One forward and backward pass of n passages; `best` are their leading tokens so far."""
        # The columns of a passage do not depend on the other passages of its group.
        room = whole_columns(self._counted(best, task.length)).minimum(task.length)
        width = int(room.max())
        e, m = vectors.e.requires_grad_(), vectors.m.requires_grad_()
        truth = task.ids[:, :width]
        with torch.enable_grad():
            both = torch.cat([e, m.expand(len(e), -1, -1)], dim=1)
            states = self.lm.states(as_stored(both, self.storage), truth)
        scores = score(self.lm.head, states, truth, self.recipe, V=self.lm.vocab_size)
        column = torch.arange(width, device=room.device)
        within = column < room[:, None]
        right = (scores.margin >= task.margin[:, None]) & (scores.margin > 0)
        leading = torch.minimum(horizon(right | ~within), room)
        counted = self._counted(torch.maximum(best, leading), task.length).minimum(room)
        weight = self.objective.weights(column < counted[:, None], scores.margin, task.margin)
        finite = bool(torch.isfinite((scores.loss * weight).where(weight != 0, 0).sum()))
        slope = scores.gradient.mul_(weight[..., None])
        gradient = Pair(*torch.autograd.grad(states, (e, m), slope))
        return Measurement(leading, counted, gradient, finite)

    def _counted(self, best: Tensor, length: Tensor) -> Tensor:
        """Tokens that count if `best` leading tokens are right, with the schedule's first state."""
        size = torch.zeros(len(best), device=best.device)
        state = self.schedule.fresh(size, size > 0)
        state.best = best
        return self.schedule.counted(state, length)

    def _report(self, leading: Tensor, in_slots: int) -> None:
        if self.on_progress is not None:
            mean = float(leading.float().mean())
            now = Progress(in_slots, 0, mean, steps=self.steps, tokens=self.tokens)
            self.on_progress(now)
