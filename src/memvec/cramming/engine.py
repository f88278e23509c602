"""The engine crams many passages at once in slots; passages do not affect each other.

    fill      free slots get waiting passages
    step      one step for all slots (memvec.cramming.step)
    retire    stopped passages leave their slots
    certify   stopped passages are decoded and measured from their stored vectors, in groups;
              a passage that met its margins and does not decode waits again

A passage holds a slot until it is done or out of budget. Then the next waiting passage gets the
slot, so the batch stays full. A stopped passage counts as a slot until it is certified, so a run
that is killed loses at most `batch_size` passages.

Slots are independent: losses are summed, each slot has its own moments and step count, and seeds
come from token ids. At one batch shape and in one slot, the vectors of a passage are bit-equal
whatever the other slots hold. `fixed_shapes=True` keeps the shape to the end; otherwise empty slots
and unused columns are left out. Another shape or slot changes only the rounding, and so do GPU
kernels that add in no fixed order.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from memvec import registry
from memvec.cramming import starts
from memvec.cramming.batch import BatchState, Job, Progress, Waiting, refuse_for_memory
from memvec.cramming.coordinates import supported_coordinates
from memvec.cramming.outcomes import Finished, Outcome, outcomes_of
from memvec.cramming.recipe import Recipe
from memvec.cramming.step import Step
from memvec.decoding import BATCH
from memvec.errors import MemvecError, check_minimum
from memvec.graphs import columns_for, rows_for, whole_columns
from memvec.model.lm import FrozenLM
from memvec.model.memory import fits, forget_freed_memory, in_batches, out_of_memory
from memvec.model.precision import for_steps
from memvec.passages.passage import Passage, padded_ids
from memvec.storage import Storage, storage_of


class Engine:
    """Crams passages into `vectors` (K) vectors each, up to `batch_size` passages at once.

    `storage` is the number format in which vectors are certified and stored (memvec.storage).
    `graphs` replays steps on a GPU instead of launching each kernel (memvec.graphs); rows and
    columns are then rounded up to a few shapes. By default, `load_lm` decides. `poll` is the number
    of steps between checks for finished passages: 8 with graphs, since a check synchronises with
    the device, else 1, since transformers synchronises in most steps anyway. Raises MemvecError for
    unsupported settings.
    """

    step_type: type[Step] | None = None  # overrides the `step_type` of the term

    def __init__(
        self,
        lm: FrozenLM,
        recipe: Recipe | None = None,
        *,
        vectors: int = 1,
        batch_size: int = 32,
        storage: str | torch.dtype | Storage = "float32",
        fixed_shapes: bool = False,
        graphs: bool | None = None,
        poll: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        check_minimum(1, vectors=vectors, batch_size=batch_size, poll=poll)
        lm.check_unchanged()
        family = str(lm.config.model_type)
        recipe = (recipe or Recipe()).in_logits(lm.logit_spread).for_family(family)
        self.lm = lm = starts.view_for(lm, recipe)
        self.K, self.batch_size, self.on_progress = vectors, batch_size, on_progress
        self.module = for_steps(lm, recipe.compute)
        # The record needs the choices made here. Only vectors in front of tokens are enlarged.
        self.recipe = replace(
            recipe,
            compute="model" if self.module is lm else "bfloat16",
            lr_large=recipe.lr_large if lm.reading.enlarges else 0.0,
            coordinates=supported_coordinates(recipe.coordinates, lm),
        )
        self.storage = storage_of(storage)
        self.fixed_shapes, self.graphs = fixed_shapes, lm.graphs if graphs is None else graphs
        self.start_rule = starts.resolve_start_rule(lm, self.recipe)
        self.poll = poll or (8 if self.graphs else 1)
        term = registry.get("term", self.recipe.term)
        step_type = self.step_type or getattr(term, "step_type", None) or Step
        self.stepper: Step = step_type(
            lm,
            self.module,
            self.recipe,
            vectors,
            start_rule=self.start_rule,
            storage=self.storage,
            fixed_shapes=fixed_shapes,
            graphs=self.graphs,
        )
        self.given = self.stepper.given  # leading tokens that are not predicted
        self.schedule, self.waiting = self.stepper.schedule, Waiting()
        self.jobs: list[Job] = []  # jobs in the slots, in the order of the batch's rows
        self.batch: BatchState | None = None  # None while all slots are free
        self.columns = 0  # predicted columns of the next forward pass
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    # ------------------------------------------------------------------ public methods

    def push(self, passage: Passage) -> None:
        """Queue a passage, also while `run` is active. Raises MemvecError if it does not fit."""
        limit = self.max_tokens()
        if limit is not None and len(passage) > limit:
            raise MemvecError(
                f"a passage of {len(passage)} tokens and {self.K} vectors does not fit the "
                f"context of {self.lm.name} ({self.lm.context}): at most {limit} tokens."
            )
        if len(passage) <= self.given:
            raise MemvecError("with the start rule 'first-token' a passage needs two tokens.")
        self.waiting.push(Job(passage, self.recipe.margin))

    def push_again(self, outcome: Outcome) -> None:
        """Queue a passage whose decoding disagrees with its margins again, with a raised margin."""
        job = Job.with_raised_margin(outcome, self.lm.logit_spread)
        job.steps += 1  # a retry costs a step, so the number of retries is limited
        self.waiting.push(job)

    def max_tokens(self) -> int | None:
        """Longest passage (tokens) that fits the context beside the vectors; None: no limit."""
        if self.lm.context is None:
            return None
        around = len(self.lm.front) + len(self.lm.trigger) * (self.start_rule == "bos")
        return self.lm.context - self.K - around

    def trial(self, tokens: int, batch_size: int) -> float:
        """Seconds of a step with `batch_size` passages of `tokens` tokens; 0 if memory runs out."""
        trial_step = functools.partial(self.stepper.rehearse, tokens, batch_size)
        if not fits(trial_step):  # the first call is the warm-up
            forget_freed_memory()
            return 0.0  # `run` halves the batch until it fits
        began = time.perf_counter()
        fits(trial_step)
        return time.perf_counter() - began

    def run(self, passages: Iterable[Passage] = ()) -> Iterator[Outcome]:
        """Cram `passages` and all waiting ones; yields each outcome when it is certified.

        A caller may `push` further passages between yields. Raises MemvecError as `push` does, and
        if one passage alone does not fit in memory.
        """
        for passage in passages:
            self.push(passage)
        finished: list[Finished] = []
        while self.jobs or self.waiting or finished:
            self.fill(self.batch_size - len(finished))
            if self.jobs:
                began = time.perf_counter()
                for _ in range(self.poll):
                    if not fits(self.step):
                        self._halve_batch()
                        break
                self._share_time(began)
                finished += self.retire_stopped()
                self._report()
            if len(finished) >= min(BATCH, -(-self.batch_size // 2)) or not self.jobs:
                yield from self._final_outcomes(finished)
                finished = []

    # ------------------------------------------------------------------ fill

    def fill(self, slots: int) -> None:
        """Fill up to `slots` slots with waiting passages; set the columns of the next steps."""
        free = min(slots - len(self.jobs), len(self.waiting))
        new_jobs = [self.waiting.pop() for _ in range(free)]
        if new_jobs and not fits(lambda: self._give_slots(new_jobs)):
            self._put_back(new_jobs)
            self.fill(self.batch_size)
        elif self.batch is not None:
            longest = self.batch.columns - self.given
            counted = self.schedule.counted(self.batch.schedule, self.batch.length)
            # Leave room for the tokens that may count before the next check. The room of a passage
            # does not depend on the other slots, so a passage that needs more waits for the check.
            counted = counted + self.schedule.may_count(self.poll - 1)
            self.batch.room = whole_columns(counted)
            needed = int(self.batch.room.max().clamp_min(1))
            columns = columns_for(needed) if self.graphs else needed
            self.columns = longest if self.fixed_shapes else min(longest, columns)

    def _give_slots(self, new_jobs: list[Job]) -> None:
        """Put each of these jobs into a slot."""
        columns = max(len(job.passage) for job in new_jobs)
        if self.batch is not None:  # `ids` may be wider than every passage that is in a slot now
            columns = max(columns, self.batch.columns)
            self.batch.widen(columns)
        rows = self._new_rows(new_jobs, columns)
        self.batch = rows if self.batch is None else self.batch.joined(rows)
        self.jobs = self.jobs + new_jobs

    def _put_back(self, new_jobs: list[Job]) -> None:
        """Queue jobs that did not fit again, and halve their slots; MemvecError if none is left."""
        self.batch_size = len(self.jobs) + len(new_jobs) // 2
        if not self.batch_size:
            refuse_for_memory(new_jobs, self.lm.device)
        for job in new_jobs:
            self.waiting.push(job)
        forget_freed_memory()

    def _new_rows(self, jobs: list[Job], columns: int) -> BatchState:
        """Rows of the batch for jobs that enter a slot."""
        device = self.lm.device
        vectors = self._first_vectors(jobs).to(device)
        length = torch.tensor([len(job.passage) - self.given for job in jobs], device=device)
        continues = [starts.continues(self.recipe) or job.vectors is not None for job in jobs]
        crammed_before = torch.tensor(continues, device=device)
        size = vectors.float().square().mean((1, 2)).sqrt()
        # Vectors take small steps only near an encoder's start. Vectors that were crammed before
        # and have at least half of the large size were enlarged then, and stay large.
        was_large = crammed_before & (size >= self.recipe.lr_large / 2)
        large = (length > starts.encoder_reach(self.lm, self.recipe, self.K)) | was_large
        parameters = self.stepper.coordinates.parameters(vectors.float())
        parameters = self.stepper.enlarged(parameters, large)
        false = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        margin = torch.tensor([job.margin for job in jobs], device=device)
        return BatchState(
            ids=padded_ids([job.passage for job in jobs], columns).to(device),
            length=length,
            room=length,
            corrections=(length - 1).clamp_max(self.recipe.corrections),
            margin_asked=margin,
            target_margin=margin.clone(),
            parameters=parameters,
            vectors=vectors.float(),
            steps=torch.tensor([job.steps for job in jobs], device=device),
            spent=torch.tensor([job.spent for job in jobs], device=device),
            min_mem_bits=torch.tensor([job.min_mem_bits for job in jobs], device=device),
            done=false,
            failed=false.clone(),
            stopped=false.clone(),
            term_mean=torch.full_like(margin, torch.inf),
            term_mean_of_best=torch.full_like(margin, torch.inf),
            schedule=self.schedule.fresh(size, large),
            optimizer=self.stepper.optimizer.fresh(parameters),
            term=self.stepper.term.fresh([job.passage for job in jobs]),
        )

    def _first_vectors(self, jobs: list[Job]) -> Float[Tensor, "n K D"]:
        """The first vectors of each job: its own, or those of the recipe's start."""
        new = [job.passage.ids for job in jobs if job.vectors is None]
        alone = self.fixed_shapes
        start = iter(starts.start_vectors(self.lm, new, self.K, self.recipe, alone=alone))
        return torch.stack([next(start) if job.vectors is None else job.vectors for job in jobs])

    # ------------------------------------------------------------------ step

    def step(self) -> None:
        """One step for all slots: measure, keep better vectors, move passages that are not done."""
        assert self.batch is not None, "no slot is taken"
        B, slots = len(self.jobs), self.batch_size
        rows = slots if self.fixed_shapes else rows_for(B, slots) if self.graphs else B
        self.stepper(self.batch, self.columns, rows - B)
        self.steps += 1
        before = self.stepper.module.inputs_before(self.K, self.start_rule)
        self.tokens += (self.columns + before) * len(self.jobs)

    def _share_time(self, began: float) -> None:
        assert self.batch is not None, "no slot is taken"
        self.batch.stopped.tolist()  # wait for the device, so that its time is included
        self.seconds += (seconds := time.perf_counter() - began)
        for job in self.jobs:
            job.seconds += seconds / len(self.jobs)

    def _report(self) -> None:
        if self.on_progress is not None:
            best = None if self.batch is None else self.batch.schedule.best
            horizon = 0.0 if best is None else float(best.clamp_min(0).float().mean())
            counts = (len(self.jobs), len(self.waiting), horizon)
            costs = {"steps": self.steps, "tokens": self.tokens}
            self.on_progress(Progress(*counts, **costs, seconds=self.seconds))

    # ------------------------------------------------------------------ certify

    def _final_outcomes(self, finished: list[Finished]) -> Iterator[Outcome]:
        """Certify a group and yield final outcomes; the others wait again, with a raised margin."""
        for outcome in self._certified(finished):
            disagrees = outcome.status == "done" and not outcome.exact
            if disagrees and self._may_retry(outcome):
                self.push_again(outcome)
            else:
                yield outcome

    def _certified(self, finished: list[Finished]) -> list[Outcome]:
        """Certify a group as one batch; when memory runs out, the batch is halved."""
        settings, n = (self.start_rule, self.storage, self.recipe.corrections), len(finished)
        try:
            return in_batches(
                lambda rows: list(outcomes_of(self.lm, finished[rows], *settings)), n, n
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            longest = max(len(f.passage) for f in finished)
            raise MemvecError(
                f"a passage of up to {longest} tokens cannot be decoded in the memory of "
                f"{self.lm.device}: cram shorter passages."
            ) from error

    def _may_retry(self, outcome: Outcome) -> bool:
        recipe = self.recipe
        affordable = not recipe.budget or outcome.spent < recipe.budget
        return recipe.if_not_exact != "stop" and outcome.steps < recipe.steps and affordable

    # ------------------------------------------------------------------ retire

    def retire_stopped(self) -> list[Finished]:
        """Remove the stopped passages from their slots; returns them with their best vectors."""
        assert self.batch is not None, "no slot is taken"
        rows = [row for row, stopped in enumerate(self.batch.stopped.tolist()) if stopped]
        if not rows:
            return []
        statuses = [self.batch.status(row) for row in rows]
        return [job.finished(s) for job, s in zip(self._removed(rows), statuses, strict=True)]

    def _removed(self, rows: Sequence[int]) -> list[Job]:
        """Free the slots in these rows; returns their jobs, with the best vectors and the costs."""
        assert self.batch is not None, "no slot is taken"
        removed = [self.jobs[row] for row in rows]
        for row, job in zip(rows, removed, strict=True):
            self.batch.write_progress(row, job)
        kept = [row for row in range(len(self.jobs)) if row not in rows]
        self.jobs = [self.jobs[row] for row in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.lm.device)
        self.batch = self.batch.take(index) if kept else None
        return removed

    # ------------------------------------------------------------------ too little memory

    def _halve_batch(self) -> None:
        """Halve the slots; passages that lose theirs wait again. MemvecError for a single slot."""
        if len(self.jobs) <= 1:
            refuse_for_memory(self.jobs, self.lm.device)
        assert self.batch is not None, "no slot is taken"
        self.batch.parameters = self.batch.parameters.detach()
        self.batch_size = len(self.jobs) // 2
        for job in self._removed(range(self.batch_size, len(self.jobs))):
            self.waiting.push(job)
        forget_freed_memory()
