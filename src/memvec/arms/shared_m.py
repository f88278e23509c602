"""One m for all passages of a file: P passages in P + 1 vectors, crammed together.

The paper shares m among texts and keeps an e for each (Mezentsev & Oseledets, section 4.3: about
half of the tokens for half of the vectors). Only here do passages depend on each other: m is moved
by all of them, so each e depends on every other passage of the file, and none is finished before
all are. The record says so (`layout` 'one-step-shared'). It has two consequences: an interrupted
run starts from the beginning, and adding a passage changes every vector.

All passages move in every step, a group of `slots` at a time; the gradient at m is the sum over all
of them. It ends when every margin of every passage is met in the same step, or by the recipe's
steps, patience and budget; then the vectors of the step that gave back the largest number of
tokens are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import registry
from memvec.cramming.certify import Finished, Outcome, certify
from memvec.cramming.coordinates import as_stored
from memvec.cramming.engine import Job, Progress, resolve_start_rule
from memvec.cramming.objectives import objective_named, score
from memvec.cramming.optimizers import Adam
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import Schedule
from memvec.cramming.starts import start_vectors
from memvec.errors import MemvecError
from memvec.graphs import whole_columns
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.model.memory import forget_freed_memory, out_of_memory
from memvec.passages.passage import padded_ids
from memvec.results import Status
from memvec.storage import Storage, storage_of

RAISES = 4  # times that margins are raised because decoding disagrees with them


def without_parts(recipe: Recipe) -> Recipe:
    """The recipe without what a shared m has no use for, so that a record says what was done.

    Steps are computed by the model itself, and no passage has its own enlargement, temperature or
    look-ahead: m belongs to all.
    """
    return replace(recipe, compute="model", lr_large=0.0, stuck_after=0, narrow_after=0, settle=0)


class GroupMeasurement(NamedTuple):
    """What one pass over a group of n passages gave."""

    leading: Int[Tensor, " n"]  # leading right tokens
    counted: Int[Tensor, " n"]  # tokens that count in the loss
    gradient_e: Float[Tensor, "n 1 D"]
    gradient_m: Float[Tensor, "1 1 D"]
    finite: bool  # the loss is


class Shared:
    """Crams passages into an e each and one m. Raises MemvecError for what cannot be crammed so."""

    without_parts = staticmethod(without_parts)

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
        # One of the two vectors is a passage's own.
        self.schedule: Schedule = registry.get("schedule", recipe.schedule)(recipe, 1)
        self.optimizer: Adam = registry.get("optimizer", recipe.optimizer)(recipe)
        self.objective = objective_named(recipe.objective)
        self.storage = storage_of(storage)
        self.on_progress = on_progress
        self.steps = self.tokens = 0

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Cram the jobs' passages together; those with vectors go on from them.

        There must be at least one job; outcomes are in the order of the jobs. Where memory runs
        out they start again, with half as many in a forward pass. Raises MemvecError if one alone
        does not fit.
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
                for outcome in certify(
                    self.lm, finished[at : at + self.batch_size], "vectors", self.storage
                )
            ]
            wrong = [i for i, o in enumerate(outcomes) if o.status == "done" and not o.exact]
            out_of_steps = outcomes[0].steps - before >= self.recipe.steps
            given_up = out_of_steps or raises == RAISES or self.recipe.if_not_exact == "stop"
            if not wrong or given_up:
                break
            jobs = [
                Job.again(o, raised=spread if i in wrong else None) for i, o in enumerate(outcomes)
            ]
        return outcomes

    def _cram(self, jobs: list[Job], max_steps: int) -> list[Finished]:
        """Move all passages until every margin is met, for at most `max_steps` steps."""
        recipe, device = self.recipe, self.lm.device
        began = time.perf_counter()
        each_e, shared = (t.to(device) for t in self._start(jobs))
        lengths = [len(job.passage) for job in jobs]
        ids = padded_ids([job.passage for job in jobs], max(lengths))
        ids, length = ids.to(device), torch.tensor(lengths, device=device)
        margins = torch.tensor([job.margin for job in jobs], device=device)
        order = sorted(range(len(jobs)), key=lambda i: -lengths[i])
        groups = [
            torch.tensor(order[at : at + self.batch_size], device=device)
            for at in range(0, len(order), self.batch_size)
        ]
        optimizer = self.optimizer
        moments = [optimizer.fresh(each_e), optimizer.fresh(shared)]
        best = torch.zeros_like(length)
        spent = torch.tensor([job.spent for job in jobs], device=device)
        best_vectors, best_total, stale, steps = (each_e.clone(), shared.clone()), -1, 0, 0
        status: Status = "budget"
        while True:
            slopes = [torch.zeros_like(each_e), torch.zeros_like(shared)]
            leading, counted = torch.zeros_like(length), torch.zeros_like(length)
            finite = True
            for group in groups:
                measured = self._measure(group, each_e, shared, ids, length, margins, best)
                leading[group], counted[group] = measured.leading, measured.counted
                slopes[0][group] = measured.gradient_e
                slopes[1] += measured.gradient_m
                finite = finite and measured.finite
            best = torch.maximum(best, leading)
            total = int(leading.sum())
            if total > best_total:
                best_vectors, best_total, stale = (each_e.clone(), shared.clone()), total, 0
            else:
                stale += 1
            self._report(leading, len(jobs))
            if not finite:
                status = "not-finite"
                break
            if total == sum(lengths):
                status = "done"
                break
            over = bool(recipe.budget) and int(spent.max()) >= recipe.budget
            if steps >= max_steps or stale >= recipe.patience or over:
                break
            for parameters, slope, state in zip((each_e, shared), slopes, moments, strict=True):
                moving = torch.ones(len(parameters), dtype=torch.bool, device=device)
                optimizer.step(parameters, slope, state, moving)
            steps += 1
            spent += counted
            self.steps += 1
            self.tokens += int(counted.sum())
        vectors = torch.cat([best_vectors[0], best_vectors[1].expand(len(jobs), -1, -1)], dim=1)
        vectors = as_stored(vectors, self.storage).cpu()
        seconds = (time.perf_counter() - began) / len(jobs)
        after = [
            replace(j, steps=j.steps + steps, spent=cost, seconds=j.seconds + seconds)
            for j, cost in zip(jobs, spent.tolist(), strict=True)
        ]
        return [j.finished(v.clone(), status) for j, v in zip(after, vectors, strict=True)]

    def _start(self, jobs: list[Job]) -> tuple[Float[Tensor, "P 1 D"], Float[Tensor, "1 1 D"]]:
        """First e of each passage and first m; the seed of m derives from all passages' ids."""
        new = [job for job in jobs if job.vectors is None]
        starts = iter(start_vectors(self.lm, [job.passage.ids for job in new], 2, self.recipe))
        rows = [next(starts) if job.vectors is None else job.vectors for job in jobs]
        crammed = [job.vectors for job in jobs if job.vectors is not None]
        if crammed:
            shared = crammed[0]
        else:
            every = [token for job in jobs for token in job.passage.ids]
            shared = start_vectors(self.lm, [every], 2, self.recipe)[0]
        return torch.stack([row[:1] for row in rows]).float(), shared[None, 1:].float().clone()

    def _measure(
        self,
        group: Tensor,
        each_e: Float[Tensor, "P 1 D"],
        shared: Float[Tensor, "1 1 D"],
        ids: Tensor,
        length: Tensor,
        margins: Tensor,
        best: Tensor,
    ) -> GroupMeasurement:
        """One forward and backward pass of a group of passages."""
        length, margins, best = length[group], margins[group], best[group]
        # Each passage has the columns that it needs itself, whatever else is in its group.
        room = whole_columns(self._counted(best, length)).minimum(length)
        width = int(room.max())
        e = each_e[group].requires_grad_()
        m = shared.clone().requires_grad_()
        truth = ids[group, :width]
        with torch.enable_grad():
            vectors = torch.cat([e, m.expand(len(group), -1, -1)], dim=1)
            states = self.lm.states(as_stored(vectors, self.storage), truth)
        scores = score(self.lm.head, states, truth, self.recipe, V=self.lm.vocab_size)
        column = torch.arange(width, device=length.device)
        within = column < room[:, None]
        right = (scores.margin >= margins[:, None]) & (scores.margin > 0)
        leading = torch.minimum(horizon(right | ~within), room)
        counted = self._counted(torch.maximum(best, leading), length).minimum(room)
        weight = self.objective.weights(column < counted[:, None], scores.margin, margins)
        sound = bool(torch.isfinite((scores.loss * weight).where(weight > 0, 0).sum()))
        slope = scores.gradient.mul_(weight[..., None])
        gradient_e, gradient_m = torch.autograd.grad(states, (e, m), slope)
        return GroupMeasurement(leading, counted, gradient_e, gradient_m, sound)

    def _counted(self, best: Tensor, length: Tensor) -> Tensor:
        """Tokens that count behind horizons that were reached; the look-ahead stays as it began."""
        size = torch.zeros(len(best), device=best.device)
        state = self.schedule.fresh(size, size > 0)
        state.best = best
        return self.schedule.counted(state, length)

    def _report(self, leading: Tensor, in_slots: int) -> None:
        if self.on_progress is not None:
            mean = float(leading.float().mean())
            now = Progress(in_slots, 0, mean, steps=self.steps, tokens=self.tokens)
            self.on_progress(now)
