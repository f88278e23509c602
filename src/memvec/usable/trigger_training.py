"""Train a crammed trigger: soft tokens that all passages share, trained once for a model.

The engine crams usable vectors of many passages. The mean of the passages' gradients at the soft
tokens moves these, too.

    BOS front [vectors] trigger   -> the passage           moves front, vectors and trigger
    BOS front [vectors] query     -> as after the text     moves front and vectors

With BOS as the trigger, the vectors alone must serve both modes. A trained trigger does part of the
work of decoding mode, and trained soft tokens in front of the vectors help the model to read them,
so that the vectors can hold more of the meaning of the text (docs/usable.md).

Passages are trained in batches. Each batch begins with new vectors and the present trigger. The
file of the trigger is written after each batch, so that an interrupted run continues with the next
one. The trained trigger is for any passage: later cramming does not change it.
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

LAST_RATE = 0.05  # learning rate of the last step, as a share of the first
NOISE = 0.3  # standard deviation of the noise on the first soft tokens, whose RMS is 1


@dataclass(frozen=True)
class TriggerPlan:
    """The settings of a training.

    Raises MemvecError for a choice out of range.
    """

    rows: int = 4
    """Soft tokens after the vectors (R)."""
    front: int = 4
    """Soft tokens in front of the vectors (P); 0: none."""
    vectors: int = 4
    """Vectors of each passage (K)."""
    tokens: int = 24
    """Tokens of the passages; only for the record, since `train_trigger` gets the passages."""
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
    """The result of a batch: its number of exact passages, and the last KL (nats per token)."""

    number: int
    batches: int
    exact: int
    passages: int
    kl: float
    seconds: float


# (number of the batch, progress of its passages, its number of steps)
OnProgress = Callable[[int, Progress, int], None]


class SharedStep(Step):
    """A step that also moves the soft tokens, which all slots share."""

    optimizer_of_rows: torch.optim.Optimizer
    rate: Callable[[int], float]  # factor of the learning rate at a step of the batch
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
    """An engine whose steps also move the soft tokens."""

    step_type = SharedStep


def first_rows(lm: FrozenLM, plan: TriggerPlan) -> Float[Tensor, "N D"]:
    """The first soft tokens, those of the trigger first: the embedding of BOS (RMS 1) plus noise.

    The last one of the trigger, which precedes the passage, has no noise. For a model without BOS,
    all are noise.
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
    """Train a trigger on `plan.batches` x `plan.batch_size` passages (token ids); returns it.

    The trigger is written to `path` after each batch. If `path` holds the trigger of an interrupted
    training with the same settings and passages, this call continues from it. `recipe` crams the
    passages; the trained trigger replaces its own. `on_batch` and `on_progress` are called with the
    progress. Raises MemvecError for too few passages, for a recipe without the term 'use', for a
    file of another training, for a gradient that is not finite, and for a file that cannot be
    written.
    """
    if recipe.term != "use":
        raise MemvecError("a trigger is trained by a recipe with the term 'use' (preset usable).")
    if len(passages) < plan.batches * plan.batch_size:
        raise MemvecError(
            f"{plan.batches} batches of {plan.batch_size} need as many passages, and there are "
            f"{len(passages)}."
        )
    length = max(1, recipe.settle)  # steps of a batch, at whose last all passages end
    # A usable encoder belongs to another trigger, so 'auto' must not select it.
    start = "last-tokens" if recipe.start == "auto" else recipe.start
    recipe = replace(
        recipe,
        start=start,
        trigger="bos",
        start_rule="bos",
        steps=length,
        patience=length,
        if_not_exact="stop",
        objective_every=1,  # every step must move the trigger
        term_rise=0.0,  # it would change the weight of each passage separately
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
    """Cram a batch of passages from new vectors; returns the moved soft tokens, and a report."""

    def progressed(now: Progress) -> None:
        if on_progress is not None:
            on_progress(number + 1, now, recipe.steps)

    shared = rows.to(lm.device).clone().requires_grad_()
    engine = TriggerEngine(
        with_soft_tokens(lm, shared, plan.rows),
        recipe,
        vectors=plan.vectors,
        batch_size=len(passages),
        graphs=False,  # a replay gives no gradient of the soft tokens
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
