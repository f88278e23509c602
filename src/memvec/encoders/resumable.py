"""A training run with a frozen LM that can be stopped at any time and resumed.

What every such run has: its plan, the loop over its steps, the optimiser with its learning rate,
random numbers that depend on the seed and the step alone, and checkpoints. The runs of encoders
(`training_run.py`) and of latent models (`memvec.lab.sentences.training`) add their network, text
and loss.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from memvec.encoders.checkpoint import load_checkpoint, save_checkpoint
from memvec.errors import MemvecError, check_minimum
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.model.precision import for_steps

CHECKPOINT_EVERY = 50
Progress = TypeVar("Progress")  # the state of a run, for a progress display
Made = TypeVar("Made")  # what a run makes


class RunPlan:
    """The choices that every run has, and their checks. A plan is a frozen dataclass with them."""

    steps: int
    lr: float
    warmup: int  # steps over which the learning rate rises from 0
    seed: int  # of weights and batches

    def at_least_1(self, *names: str) -> None:
        """Raise MemvecError if one of these fields is below 1."""
        check_minimum(1, **{name: getattr(self, name) for name in names})

    def check_rate(self) -> None:
        """Raise MemvecError for a learning rate that is not between 0 and 1."""
        if not 0 < self.lr < 1:
            raise MemvecError(f"lr must be between 0 and 1, not {self.lr}.")


def check_heads(hidden: int, heads: int) -> None:
    """Raise MemvecError for a width that the heads of a network cannot share equally."""
    if hidden % heads:
        raise MemvecError(f"hidden must be a multiple of {heads}, the heads, not {hidden}.")


def check_size(size: float) -> None:
    """Raise MemvecError for a size of vectors before training that is not a number above 0."""
    if not 0 < size < float("inf"):
        raise MemvecError(f"size must be a number above 0, not {size}.")


class ResumableRun(ABC, Generic[Progress, Made]):
    """A training run that resumes from its last checkpoint as if it had not been stopped.

    A subclass sets `identity` (all that the run depends on), `network` and `optimizer`. What it
    draws for step n comes from `_generator`, and so depends on the seed and on n alone. Raises
    MemvecError for a loss that is not finite, and for the partial file of another run.
    """

    counters: ClassVar[tuple[str, ...]] = ("step", "seconds")  # attributes that checkpoints keep
    plan: RunPlan
    identity: dict[str, Any]
    network: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, lm: FrozenLM, plan: RunPlan) -> None:
        self.lm, self.plan = lm, plan
        self.fast = for_steps(lm, "auto")  # the model that the loss is differentiated through
        self.step, self.seconds = 0, 0.0

    def optimized(self, groups: Any) -> torch.optim.Optimizer:
        """AdamW for parameters, or for groups whose `rate` multiplies the plan's learning rate."""
        return torch.optim.AdamW(groups, lr=self.plan.lr, betas=(0.9, 0.98), weight_decay=0.01)

    # ------------------------------------------------------------------ the loop

    @plain_torch()
    def run(
        self,
        partial: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Made:
        """Train to the last step; returns what was trained.

        With `partial`, a stopped run resumes from its last checkpoint there.
        """
        if partial is not None and partial.exists():
            self._load(partial)
        while self.step < self.plan.steps:
            began = time.perf_counter()
            measured = self._train_step()
            self.seconds += time.perf_counter() - began
            # Also after the last step, since measuring what was trained takes minutes.
            checkpoint = self.step == self.plan.steps or self.step % CHECKPOINT_EVERY == 0
            if on_progress is not None:
                on_progress(self._progress(measured, checkpoint))
            if partial is not None and checkpoint:
                self._save(partial)
        return self._finished()

    @abstractmethod
    def _train_step(self) -> tuple[float, float]:
        """Do one step, which ends with `_move`; returns two measures of it for the display."""

    @abstractmethod
    def _progress(self, measured: tuple[float, float], checkpoint: bool) -> Progress:
        """The state of the run after a step with these measures; `checkpoint`: one is due."""

    @abstractmethod
    def _finished(self) -> Made:
        """What was trained, after the last step."""

    def _move(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
        """One step of the optimiser, from the gradients at `outputs`; None: they are losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("rate", 1.0) * self.plan.lr * self._rate()
        torch.autograd.backward(outputs, gradients)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _rate(self) -> float:
        """Factor of the learning rate: rises over `warmup`, then falls linearly to 0.01."""
        remaining = 1 - self.step / self.plan.steps
        return min((self.step + 1) / max(1, self.plan.warmup), 0.01 + 0.99 * remaining)

    def _need_finite(self, *losses: float) -> None:
        if not all(map(math.isfinite, losses)):
            raise MemvecError(
                f"the loss was not finite at step {self.step + 1}: lower the learning rate (now "
                f"{self.plan.lr})."
            )

    # ------------------------------------------------------------------ random numbers and files

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.plan.seed}/{purpose}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _save(self, partial: Path) -> None:
        numbers = [getattr(self, name) for name in self.counters]
        save_checkpoint(partial, self.identity, self.network, self.optimizer, numbers)

    def _load(self, partial: Path) -> None:
        numbers = load_checkpoint(partial, self.identity, self.network, self.optimizer)
        for name, number in zip(self.counters, numbers, strict=True):
            setattr(self, name, number)
