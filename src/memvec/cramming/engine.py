"""The engine: slots in which passages are crammed together, independent of each other.

A passage sits in a slot until it is done or given up; then the next waiting one takes its place, so
the batch stays full and nobody waits for the slowest. One step for all slots:

    vectors -> states (model, gradients to the vectors) -> score (loss, margins, gradient at states)
            -> what was measured is compared with the best so far and kept if better
            -> what counts now, and how much, follows from what was measured
            -> the optimiser moves the passages that are not done

Measure, then move: the vectors of a finished passage are the very ones that were measured, rounded
to the storage dtype already. Finished passages leave for certification (free-running decoding) in
groups, keeping their slots until then; one that fails goes on with a larger margin.

Slots share nothing but a batch: losses are summed, moments and step counts are per slot, and seeds
come from token ids. At a fixed batch shape a passage's vectors are bit-equal whoever sits beside
it; `fixed_shapes=True` keeps the shape fixed to the end, otherwise empty slots are dropped and
columns that nobody counts are left out, which changes rounding only.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memvec.cramming.certify import Finished, Outcome, certify
from memvec.cramming.coordinates import COORDINATES, as_stored
from memvec.cramming.objective import score, weights
from memvec.cramming.optimizer import OPTIMIZERS
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedule import SCHEDULES, cooled, look_ahead
from memvec.cramming.start import start_of, start_vectors
from memvec.decoding import BATCH
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM, StartRule
from memvec.model.memory import forget_freed_memory, out_of_memory
from memvec.model.precision import for_steps
from memvec.passages.passage import Passage
from memvec.results import Status
from memvec.storage import Storage, storage_of

SMALLEST_RAISE = 0.05  # of the logits' spread; margin after a failed certification from margin 0
NEAR = 2  # times what an encoder is worth: longer passages it does not put near what they need
COLUMNS = 16  # the forward pass is as long as the longest counted part, rounded up to this


@dataclass
class Job:
    """A passage on its way: waiting, in slots or returned. Carries what it has spent so far."""

    passage: Passage
    margin: float
    vectors: Tensor | None = None  # (K, D); None: start from the recipe's start
    steps: int = 0
    spent: int = 0
    seconds: float = 0.0

    @classmethod
    def again(cls, outcome: Outcome, *, raised: float | None = None) -> Job:
        """A passage that goes on from where it was; with twice the margin if `raised`, which is the
        model's logit spread."""
        margin = outcome.margin_asked
        if raised is not None:
            margin = max(2 * margin, SMALLEST_RAISE * raised)
        vectors = outcome.vectors.float()
        return cls(outcome.passage, margin, vectors, outcome.steps, outcome.spent, outcome.seconds)


@dataclass(frozen=True)
class Progress:
    """How the running batch stands, for whoever shows it."""

    in_slots: int
    waiting: int
    horizon: float  # mean leading right tokens over the slots
    steps: int  # engine steps so far
    tokens: int  # forward-backward tokens so far
    seconds: float = 0.0  # in engine steps so far; filling slots and certifying not counted


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

    def __len__(self) -> int:
        return len(self._heap)


class Engine:
    """Crams passages with K vectors each, up to `slots` at once.

    `storage` is how vectors will be stored and are certified (memvec.storage). `poll` is how many
    steps pass between looks at who is done (a look makes the device wait). Raises MemvecError for
    settings that cannot work with the model.
    """

    def __init__(
        self,
        lm: FrozenLM,
        recipe: Recipe | None = None,
        *,
        vectors: int = 1,
        batch_size: int = 32,
        storage: str | torch.dtype | Storage = "float32",
        fixed_shapes: bool = False,
        poll: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        if vectors < 1:
            raise MemvecError(f"--vectors must be at least 1, not {vectors}.")
        if batch_size < 1:
            raise MemvecError(f"--batch-size must be at least 1, not {batch_size}.")
        self.lm, self.K, self.batch_size = lm, vectors, batch_size
        self.recipe = (recipe or Recipe()).in_logits(lm.logit_spread)
        self.fast = for_steps(lm, self.recipe.compute)  # what steps are computed with
        # As it was done, for the record. Large steps are for vectors that stand in front of tokens.
        self.recipe = replace(
            self.recipe,
            compute="model" if self.fast is lm else "bfloat16",
            lr_large=self.recipe.lr_large if lm.layout == "prefix" else 0.0,
        )
        self.storage = storage_of(storage)
        self.fixed_shapes, self.on_progress = fixed_shapes, on_progress
        self.start_rule = resolve_start_rule(lm, self.recipe)
        self.given = int(self.start_rule == "first-token")  # leading tokens that are not predicted
        self.poll = poll or (1 if lm.device.type == "cpu" else 8)
        self.coordinates = COORDINATES[self.recipe.coordinates](self.recipe, vectors, lm.width)
        self.optimizer = OPTIMIZERS[self.recipe.optimizer](self.recipe)
        self.schedule = SCHEDULES[self.recipe.schedule]
        self.jump = self.recipe.lr_large / self.recipe.lr if self.recipe.lr_large else 1.0
        self.waiting = Waiting()
        self.jobs: list[Job] = []
        self.state: dict[str, Tensor] = {}
        self.width = 0  # predicted columns of the forward pass now
        self.steps = self.tokens = 0
        self.seconds = 0.0

    # ------------------------------------------------------------------ what a caller uses

    def push(self, passage: Passage) -> None:
        """Add a passage, also while `run` is under way. Raises MemvecError if it cannot fit."""
        most = self.most_tokens()
        if most is not None and len(passage) > most:
            raise MemvecError(
                f"a passage of {len(passage)} tokens and {self.K} vectors does not fit the "
                f"context of {self.lm.name} ({self.lm.context}): at most {most} tokens."
            )
        if len(passage) <= self.given:
            raise MemvecError("with the start rule 'first-token' a passage needs two tokens.")
        self.waiting.push(Job(passage, self.recipe.margin))

    def push_again(self, outcome: Outcome) -> None:
        """Return a passage that was exact here and not elsewhere: on, with twice the margin."""
        job = Job.again(outcome, raised=self.lm.logit_spread)
        job.steps += 1  # a retry is never free, so it cannot go on for ever
        self.waiting.push(job)

    def most_tokens(self) -> int | None:
        """Longest passage that fits the model's context behind the vectors."""
        if self.lm.context is None:
            return None
        return self.lm.context - self.K - (self.start_rule == "bos")

    def trial(self, tokens: int, batch_size: int) -> float:
        """Seconds of a step of `slots` passages of `tokens` tokens: one is made, and dropped.

        0 if memory runs out for it: then the run itself will find out how much fits.
        """
        vectors = torch.zeros(batch_size, self.K, self.lm.width, device=self.lm.device)
        ids = torch.zeros(batch_size, tokens, dtype=torch.long, device=self.lm.device)

        def once() -> None:
            inputs = vectors.requires_grad_()
            with torch.enable_grad():
                states = self.fast.states(inputs, ids, self.start_rule)
            found = score(
                self.fast.head, states, ids[:, self.given :], self.recipe, V=self.lm.vocab_size
            )
            torch.autograd.grad(states, inputs, found.gradient)[0].sum().item()  # waits for it

        if not self._fits(once):  # the first one also warms up
            forget_freed_memory()
            return 0.0
        began = time.perf_counter()
        self._fits(once)
        return time.perf_counter() - began

    def run(self, passages: Iterable[Passage] = ()) -> Iterator[Outcome]:
        """Cram everything that waits; yields each outcome as soon as it is certified.

        A caller may `push` further passages (the halves of one that did not fit) between yields.
        """
        for passage in passages:
            self.push(passage)
        finished: list[Finished] = []
        while self.jobs or self.waiting or finished:
            # A passage keeps its slot until it is certified: killed now, a run loses no more.
            self._fill_slots(self.batch_size - len(finished))
            if self.jobs:
                began = time.perf_counter()
                for _ in range(self.poll):
                    if not self._fits(self.step):
                        self._halve_batch()
                        break
                self._share_time(time.perf_counter() - began)
                finished += self._retire_stopped()
                self._report()
            if len(finished) >= min(BATCH, -(-self.batch_size // 2)) or not self.jobs:
                for outcome in self._certified(finished):
                    wrong = outcome.status == "done" and not outcome.exact
                    if wrong and self._may_go_on(outcome):
                        self.push_again(outcome)  # decoding disagrees with the margins
                    else:
                        yield outcome
                finished = []

    # ------------------------------------------------------------------ too little memory

    def _fits(self, work: Callable[[], None]) -> bool:
        """Do it; False if memory ran out. What had been measured by then stays measured."""
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _halve_batch(self) -> None:
        """Go on with half of the slots; the passages of the others wait again, where they are.

        Raises MemvecError if a single passage does not fit.
        """
        if len(self.jobs) <= 1:
            longest = max((len(job.passage) for job in self.jobs), default=0)
            raise MemvecError(
                f"one passage of {longest} tokens does not fit in the memory of {self.lm.device}: "
                "use fewer --tokens, or load_lm(..., checkpointing=True)."
            )
        self.batch_size = stay = len(self.jobs) // 2
        s, leaving = self.state, self.jobs[stay:]
        s["parameters"] = s["parameters"].detach()
        vectors = s["vectors"][stay:].cpu()  # the best that were measured: nothing is lost
        for i, job in enumerate(leaving):
            job.vectors = vectors[i].clone()
            job.steps, job.spent = int(s["steps"][stay + i]), int(s["spent"][stay + i])
            self.waiting.push(job)
        self.jobs = self.jobs[:stay]
        self.state = {key: tensor[:stay].clone() for key, tensor in s.items()}
        forget_freed_memory()

    def _certified(self, finished: list[Finished]) -> Iterator[Outcome]:
        """Certify together, or in halves where memory runs out."""
        outcomes: list[Outcome] = []

        def together() -> None:
            found = certify(
                self.lm, finished, self.start_rule, self.storage, self.recipe.corrections
            )
            outcomes.extend(found)

        if self._fits(together):
            yield from outcomes
            return
        forget_freed_memory()
        if len(finished) == 1:
            raise MemvecError(
                f"one passage of {len(finished[0].passage)} tokens cannot be decoded in the memory "
                f"of {self.lm.device}: use fewer --tokens."
            )
        half = len(finished) // 2
        yield from self._certified(finished[:half])
        yield from self._certified(finished[half:])

    def _may_go_on(self, outcome: Outcome) -> bool:
        budget = self.recipe.budget
        return outcome.steps < self.recipe.steps and (not budget or outcome.spent < budget)

    # ------------------------------------------------------------------ one step for all slots

    def step(self) -> None:
        """Measure all slots, keep what is better, move those that are not done."""
        s, recipe = self.state, self.recipe
        width = self.width
        parameters = s["parameters"].requires_grad_()
        with torch.enable_grad():
            vectors = as_stored(self.coordinates.vectors(parameters), self.storage)
            ids = _with_padding(s["ids"][:, : width + self.given], self._padding_rows())
            states = self.fast.states(
                _with_padding(vectors, self._padding_rows()), ids, self.start_rule
            )
        warm = cooled(s["stale"], s["margin"], recipe)
        warm = _with_padding(warm, self._padding_rows(), recipe.temperature)
        found = score(
            self.fast.head,
            states,
            ids[:, self.given :],
            recipe,
            temperature=warm,
            V=self.lm.vocab_size,
        )
        margin, loss = found.margin[: len(self.jobs)], found.loss[: len(self.jobs)]
        # Measure ...
        column = torch.arange(width, device=margin.device)
        within = column < s["length"][:, None]
        right = (margin >= s["margin"][:, None]) & (margin > 0)
        missed = ~right & within
        leading = torch.minimum((missed.cumsum(-1) <= s["allowed"][:, None]).sum(-1), s["length"])
        reached = (right & within).sum(-1) if recipe.schedule == "whole" else leading
        better = reached > s["best"]
        gained = (reached - s["best"].clamp_min(0)).clamp_min(0)
        s["best"] = torch.where(better, reached, s["best"])
        s["vectors"] = torch.where(better[:, None, None], vectors.detach(), s["vectors"])
        s["stale"] = torch.where(better, 0, s["stale"] + 1)
        arrived = (leading >= s["length"]) & (s["length"] <= width)
        s["done"] |= arrived if self.fast is self.lm else self._confirmed(arrived)
        # ... say what counts now ...
        stale = torch.where(s["large"], s["stale"], 0) if recipe.lr_large else s["stale"]
        s["ahead"], s["stage"] = look_ahead(s["ahead"], s["stage"], gained, stale, self.K, recipe)
        newly = ~s["large"] & (s["stale"] >= recipe.stuck_after) & bool(recipe.stuck_after)
        s["large"] |= newly
        counted = self.schedule(s["best"], s["ahead"], s["length"]).clamp_max(width)
        weight = weights(column < counted[:, None], margin, s["margin"], recipe)
        s["failed"] |= ~torch.isfinite((loss * weight).sum(-1))
        spent_up = (s["steps"] >= recipe.steps) | (s["stale"] > recipe.patience)
        if recipe.budget:
            spent_up |= s["spent"] >= recipe.budget
        s["stopped"] |= s["done"] | s["failed"] | spent_up
        # ... then move.
        moving = ~s["stopped"]
        slope = found.gradient.mul_(_with_padding(weight, self._padding_rows())[..., None])
        (gradient,) = torch.autograd.grad(states, parameters, slope)
        parameters = self._enlarged(parameters.detach(), newly)
        s["faster"] = torch.where(newly, self.jump, s["faster"])
        optimizer_state = {name[4:]: t for name, t in s.items() if name.startswith("opt.")}
        self.optimizer.step(parameters, gradient, optimizer_state, moving, s["faster"])
        s["parameters"] = parameters
        # A passage pays for what counts for it, as if it were alone: not for its neighbours' width.
        given = self.lm.inputs_before(self.K, self.start_rule)
        s["steps"] += moving
        s["spent"] += (counted + given) * moving
        self.steps += 1
        self.tokens += (width + given) * len(self.jobs)

    @torch.no_grad()
    def _enlarged(self, parameters: Tensor, rows: Tensor) -> Tensor:
        """Parameters with the vectors of some rows (B) as large as the steps that they will take.

        Along their own direction: what they hold stays theirs (docs/log.md). As they are, where the
        recipe has no rate for large ones.
        """
        if not self.recipe.lr_large:
            return parameters
        vectors = self.coordinates.vectors(parameters)
        size = vectors.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
        large = self.coordinates.parameters(vectors * (self.recipe.lr_large / size).clamp_min(1))
        rows = rows.reshape(-1, *(1 for _ in parameters.shape[1:]))
        return torch.where(rows, large, parameters)

    @torch.no_grad()
    def _confirmed(self, arrived: Tensor) -> Tensor:
        """Which of the arrived passages (B) have their margins in the model's own dtype, too.

        The others go on from the same vectors, and are asked for a little more than they lacked.
        """
        rows = arrived.nonzero()[:, 0]
        if not len(rows):
            return arrived
        if self.fixed_shapes:  # whose margins, too, owe nothing to how many arrive together
            rows = torch.arange(len(arrived), device=arrived.device)
        s = self.state
        ids, length = s["ids"][rows], s["length"][rows]
        padded = _with_padding(ids, self._padding_rows())
        states = self.lm.states(
            _with_padding(s["vectors"][rows], self._padding_rows()), padded, self.start_rule
        )
        found = score(
            self.lm.head, states, padded[:, self.given :], self.recipe, V=self.lm.vocab_size
        )
        margin = found.margin[: len(rows)]
        within = torch.arange(margin.shape[1], device=margin.device) < length[:, None]
        ranked = margin.masked_fill(~within, torch.inf).sort(-1).values
        least = ranked.gather(1, s["allowed"][rows][:, None])[:, 0]
        asked = s["asked"][rows]
        confirmed = (least >= asked) & (least > 0)
        short = arrived[rows] & ~confirmed
        more = 1.25 * (asked - least) + 0.01 * self.lm.logit_spread
        s["margin"][rows] += torch.where(short, more, 0.0)
        s["best"][rows] -= short.long()
        return arrived.index_fill(0, rows[short], False)

    # ------------------------------------------------------------------ slots

    def _fill_slots(self, batch_size: int) -> None:
        """Fill up to `slots` slots with waiting passages; set the width of the next steps."""
        free = min(batch_size - len(self.jobs), len(self.waiting))
        newcomers = [self.waiting.pop() for _ in range(free)]
        if newcomers:
            columns = max(len(job.passage) for job in newcomers)
            if self.jobs:  # the slots may still be as wide as a passage that has left
                columns = max(columns, self.state["ids"].shape[1])
            fresh = self._fresh(newcomers, columns)
            if self.jobs:
                self.state["ids"] = _widen(self.state["ids"], columns)
                fresh = {key: torch.cat([self.state[key], fresh[key]]) for key in fresh}
            self.state, self.jobs = fresh, self.jobs + newcomers
        if self.jobs:
            s = self.state
            longest = s["ids"].shape[1] - self.given
            counted = self.schedule(s["best"], s["ahead"], s["length"])
            # Room for what may count before the next look; what comes sooner waits for it.
            need = int(counted.max()) + (self.poll - 1) * self.recipe.look_ahead * self.K
            self.width = (
                longest if self.fixed_shapes else min(longest, -(-need // COLUMNS) * COLUMNS)
            )

    def _fresh(self, jobs: list[Job], columns: int) -> dict[str, Tensor]:
        """The state of newly in slots jobs."""
        lm, n, device = self.lm, len(jobs), self.lm.device
        ids = torch.zeros(n, columns, dtype=torch.long)
        for row, job in zip(ids, jobs, strict=True):
            row[: len(job.passage)] = torch.tensor(job.passage.ids)
        new = [job for job in jobs if job.vectors is None]
        again = torch.tensor([job.vectors is not None for job in jobs], device=device)
        starts = start_vectors(
            lm, [job.passage.ids for job in new], self.K, self.recipe, alone=self.fixed_shapes
        )
        for job, start in zip(new, starts, strict=True):
            job.vectors = start
        vectors = torch.stack([job.vectors for job in jobs if job.vectors is not None]).to(device)
        length = torch.tensor([len(job.passage) - self.given for job in jobs], device=device)
        size = vectors.float().square().mean((1, 2)).sqrt()
        # Small steps are for vectors that an encoder put near where they have to be. One that
        # comes back large was made so when its passage was stuck.
        large = length > self._near()
        large |= again & (size >= self.recipe.lr_large / 2)
        parameters = self._enlarged(self.coordinates.parameters(vectors.float()), large)
        count = torch.zeros(n, dtype=torch.long, device=device)
        flag = torch.zeros(n, dtype=torch.bool, device=device)
        state = {
            "ids": ids.to(device),
            "length": length,
            # Tokens that may be missed before the horizon ends: they will be listed.
            "allowed": (length - 1).clamp_max(self.recipe.corrections),
            "asked": torch.tensor([job.margin for job in jobs], device=device),
            # The same; steps in another dtype than the model's may have to ask for a little more.
            "margin": torch.tensor([job.margin for job in jobs], device=device),
            "parameters": parameters,
            "vectors": vectors.float(),  # the best measured so far, as stored
            "best": count - 1,  # less than anything that is measured
            "stale": count.clone(),
            "ahead": count + self.recipe.look_ahead * self.K,
            "stage": count + self.recipe.look_ahead * self.K,
            "steps": torch.tensor([job.steps for job in jobs], device=device),
            "spent": torch.tensor([job.spent for job in jobs], device=device),
            "done": flag.clone(),
            "failed": flag.clone(),
            "large": large,
            "faster": torch.where(large, self.jump, size.clamp_min(1)),
            "stopped": flag.clone(),
        }
        return state | {f"opt.{k}": t for k, t in self.optimizer.fresh(parameters).items()}

    def _near(self) -> float:
        """Length (tokens) up to which the recipe's start is near what a passage needs; 0: never."""
        encoder = self.lm.encoder
        if encoder is None or start_of(self.lm, self.recipe) != "encoder":
            return 0.0
        if not self.recipe.lr_large:
            return 0.0
        return float(NEAR * encoder.tokens * self.K) or math.inf  # 0: worth encoding at any length

    def _retire_stopped(self) -> list[Finished]:
        """Take the stopped passages out, with the vectors that were measured for them."""
        stopped = self.state["stopped"].tolist()
        if not any(stopped):
            return []
        s = {key: self.state[key].cpu() for key in ("vectors", "done", "failed", "steps", "spent")}
        finished = []
        for i, job in enumerate(self.jobs):
            if stopped[i]:
                job.vectors, job.steps, job.spent = (
                    s["vectors"][i].clone(),
                    int(s["steps"][i]),
                    int(s["spent"][i]),
                )
                status: Status = (
                    "done" if s["done"][i] else "not-finite" if s["failed"][i] else "budget"
                )
                finished.append(
                    Finished(
                        job.passage,
                        job.vectors,
                        status,
                        job.margin,
                        job.steps,
                        job.spent,
                        job.seconds,
                    )
                )
        stay = [i for i, gone in enumerate(stopped) if not gone]
        self.jobs = [self.jobs[i] for i in stay]
        index = torch.tensor(stay, dtype=torch.long, device=self.lm.device)
        self.state = {key: tensor.index_select(0, index) for key, tensor in self.state.items()}
        return finished

    def _padding_rows(self) -> int:
        """Empty slots that are computed all the same, so that the batch keeps its shape."""
        return self.batch_size - len(self.jobs) if self.fixed_shapes else 0

    def _share_time(self, seconds: float) -> None:
        self.seconds += seconds
        for job in self.jobs:
            job.seconds += seconds / len(self.jobs)

    def _report(self) -> None:
        if self.on_progress is not None:
            best = (
                self.state["best"].clamp_min(0).float().mean() if self.jobs else torch.tensor(0.0)
            )
            now = (self.steps, self.tokens, self.seconds)
            self.on_progress(Progress(len(self.jobs), len(self.waiting), float(best), *now))


def resolve_start_rule(lm: FrozenLM, recipe: Recipe) -> StartRule:
    """The start rule that applies to this model ('paper' depends on its tokenizer)."""
    rule: StartRule
    if recipe.start_rule == "paper":
        rule = "bos" if lm.tokenizer is not None and lm.adds_bos else "first-token"
    else:
        rule = recipe.start_rule
    if rule == "bos" and lm.bos_id is None:
        raise MemvecError(f"{lm.name} has no BOS token: use --start-rule vectors.")
    return rule


def _with_padding(rows: Tensor, padding_rows: int, value: float = 0.0) -> Tensor:
    """Rows (B, ...) with `padding rows` rows of one value behind them."""
    if not padding_rows:
        return rows
    return torch.cat([rows, rows.new_full((padding_rows, *rows.shape[1:]), value)])


def _widen(ids: Tensor, columns: int) -> Tensor:
    return (
        torch.nn.functional.pad(ids, (0, columns - ids.shape[1])) if columns > ids.shape[1] else ids
    )
