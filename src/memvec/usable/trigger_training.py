"""Training of a crammed trigger: soft tokens that all passages share, once for a model.

Passages are crammed for use in slots as usual, and the mean of their gradients at the soft tokens
moves these.

    BOS front [vectors] trigger   -> the passage         front, vectors and trigger move
    BOS front [vectors] anything  -> as after the text  front and vectors move

After BOS the vectors alone have to serve both modes. A trained trigger takes over part of the
decoding mode, and soft tokens in front of the vectors help the model to read them, so that more of
the vectors is left for the meaning of the text (docs/usable.md).

Passages come in batches; each begins with new vectors and the trigger of the last one, and the file
of the trigger is written after each, so that an interrupted run continues with the next batch. The
trigger is for any passage: cramming does not change it, and no passage depends on another.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.companions.around import CrammedTrigger, with_soft_tokens
from memvec.companions.triggers import save_trigger, stored_trigger
from memvec.cramming.batch import BatchState, Progress
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.step import Measurement, Step
from memvec.errors import MemvecError, check_minimum
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.usable.recipe_files import named_files
from memvec.writing import path_of

LAST_RATE = 0.05  # share of the learning rate at the end
NOISE = 0.3  # of the first soft tokens, beside the embedding that they begin as


@dataclass(frozen=True)
class TriggerPlan:
    """The choices of a training, on passages in K vectors each.

    Raises MemvecError for a choice out of range.
    """

    rows: int = 4
    """Soft tokens after the vectors (R)."""
    front: int = 4
    """Soft tokens in front of them (P); 0: none."""
    vectors: int = 4
    """Vectors of each passage (K)."""
    tokens: int = 24
    """Tokens of the passages, for the record: `train_trigger` is given the passages themselves."""
    batches: int = 4
    batch_size: int = 16
    """Passages of a batch."""
    lr: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "vectors", "tokens", "batches", "batch_size"):
            check_minimum(1, **{name: getattr(self, name)})
        check_minimum(0, front=self.front)
        if not 0 < self.lr < math.inf:
            raise MemvecError(f"lr must be a number above 0, not {self.lr}.")


@dataclass(frozen=True)
class BatchReport:
    """The result of a batch: passages that decode exactly, and their last KL, nats per token."""

    number: int
    batches: int
    exact: int
    passages: int
    kl: float
    seconds: float


# The number of the batch, the progress of its passages, and its number of steps.
OnProgress = Callable[[int, Progress, int], None]


class SharedStep(Step):
    """A step whose slots also move the trigger of the model that they share."""

    optimizer_of_rows: torch.optim.Optimizer
    rate: Callable[[int], float]  # share of the learning rate at a step of the batch
    taken: int = 0
    last_kl: float = math.nan

    def measure(self, batch: BatchState, columns: int, padding_rows: int = 0) -> Measurement:
        measured = super().measure(batch, columns, padding_rows)
        self.last_kl = float(measured.term.loss.mean())
        return measured

    def gradient(
        self, outputs: Sequence[Tensor], batch: BatchState, slopes: Sequence[Tensor]
    ) -> Tensor:
        rows = self.lm.soft
        assert rows is not None
        gradient, shared = torch.autograd.grad(outputs, [batch.parameters, rows], slopes)
        if not bool(torch.isfinite(shared).all()):
            raise MemvecError(
                "the gradient of the trigger is not finite: use a smaller learning rate."
            )
        rows.grad = shared / len(batch)
        for group in self.optimizer_of_rows.param_groups:
            group["lr"] = group["initial_lr"] * self.rate(self.taken)
        self.optimizer_of_rows.step()
        self.taken += 1
        return gradient


class TriggerEngine(Engine):
    """An engine whose steps move the trigger, too."""

    step_type = SharedStep


def first_rows(lm: FrozenLM, plan: TriggerPlan) -> Float[Tensor, "N D"]:
    """Soft tokens to begin with: the token that opens a text, of size (RMS) 1, and noise.

    Noise alone for a model without such a token. The trigger's rows come first; its last one,
    after which the passage comes, is the token itself.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    noise = torch.randn(plan.rows + plan.front, lm.width, generator=generator)
    if lm.bos_id is None:
        return noise
    token = lm.embed(torch.tensor([lm.bos_id], device=lm.device)).float().cpu()
    token = token / token.square().mean().sqrt().clamp_min(1e-8)
    noise[plan.rows - 1] = 0
    return token + NOISE * noise


@plain_torch()
def train_trigger(
    lm: FrozenLM,
    passages: Sequence[Sequence[int]],
    plan: TriggerPlan,
    recipe: Recipe,
    path: str | os.PathLike[str],
    *,
    on_batch: Callable[[BatchReport], None] | None = None,
    on_progress: OnProgress | None = None,
) -> CrammedTrigger:
    """Train a trigger on passages (token ids; `plan.batches` x `plan.batch_size` of them).

    `path` gets the trigger after each batch, and a training of the same plan that finds it there
    continues from it. `recipe` crams the passages; its trigger is replaced by the trained one.
    `on_batch` and `on_progress` are called with the progress.
    Raises MemvecError for too few passages, a recipe without a second mode, another plan's file, a
    gradient that is not finite, or a file that cannot be written.
    """
    if recipe.term != "use":
        raise MemvecError("a trigger is trained by a recipe with the term 'use' (preset usable).")
    if len(passages) < plan.batches * plan.batch_size:
        raise MemvecError(
            f"{plan.batches} batches of {plan.batch_size} need as many passages, and there are "
            f"{len(passages)}."
        )
    length = max(1, recipe.settle)  # steps of a batch, whose passages all end together
    # An encoder for use was trained after another trigger, and has none to begin with here.
    start = "last-tokens" if recipe.start == "auto" else recipe.start
    recipe = replace(
        recipe,
        start=start,
        trigger="bos",
        start_rule="bos",
        steps=length,
        patience=length,
        if_not_exact="stop",
        objective_every=1,  # each step moves the trigger, too
        term_rise=0.0,  # the weight would follow each passage alone
    )
    read = hashlib.sha256(repr([list(ids) for ids in passages]).encode()).hexdigest()
    identity = {"plan": asdict(plan), "recipe": recipe.record(), "passages": read}
    identity |= named_files(recipe)
    rows, done = first_rows(lm, plan), 0
    path = path_of(path)
    if path.is_file():
        stored, about = stored_trigger(path, lm)
        done = int(about.pop("batches_done", 0))
        if about != identity:
            raise MemvecError(f"{path} is of another training: delete it, or name another file.")
        rows = stored.table
    for number in range(done, plan.batches):
        batch = passages[number * plan.batch_size : (number + 1) * plan.batch_size]
        cram = functools.partial(_crammed, plan=plan, recipe=recipe, on_progress=on_progress)
        rows, report = cram(lm, rows, [list(ids) for ids in batch], number)
        trigger = _parts(rows, plan)
        save_trigger(path, trigger, lm, identity | {"batches_done": number + 1})
        if on_batch is not None:
            on_batch(report)
    return _parts(rows, plan)


def _parts(table: Float[Tensor, "N D"], plan: TriggerPlan) -> CrammedTrigger:
    """The soft tokens after the vectors, and those in front."""
    front = table[plan.rows :] if plan.front else None
    return CrammedTrigger(table[: plan.rows], front=front)


def _crammed(
    lm: FrozenLM,
    rows: Float[Tensor, "N D"],
    passages: list[list[int]],
    number: int,
    *,
    plan: TriggerPlan,
    recipe: Recipe,
    on_progress: OnProgress | None,
) -> tuple[Float[Tensor, "N D"], BatchReport]:
    """New vectors for a batch of passages, and the trigger that they have moved."""

    def progressed(now: Progress) -> None:
        if on_progress is not None:
            on_progress(number + 1, now, recipe.steps)

    shared = rows.to(lm.device).clone().requires_grad_()
    engine = TriggerEngine(
        with_soft_tokens(lm, shared, plan.rows),
        recipe,
        vectors=plan.vectors,
        batch_size=len(passages),
        on_progress=progressed,
    )
    step = engine.stepper
    assert isinstance(step, SharedStep)
    step.optimizer_of_rows = torch.optim.NAdam(
        [{"params": [shared], "initial_lr": plan.lr}], lr=plan.lr, betas=(0.9, 0.8)
    )

    def rate(taken: int) -> float:
        share = min(1.0, (number + taken / recipe.steps) / plan.batches)
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2

    step.rate = rate
    outcomes = list(engine.run(Passage(tuple(ids), i) for i, ids in enumerate(passages)))
    report = BatchReport(
        number + 1,
        plan.batches,
        exact=sum(outcome.exact for outcome in outcomes),
        passages=len(outcomes),
        kl=step.last_kl,
        seconds=engine.seconds,
    )
    return shared.detach().cpu(), report
