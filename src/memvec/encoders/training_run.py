"""Common parts of training an encoder with a frozen LM: its plan, its steps, its files.

The encoder's vectors take the place of crammed vectors, the frozen LM predicts a passage from them,
and the loss is differentiated through the LM into the encoder. Each kind of encoder adds its
network, the vectors and passages of a step, and how the finished encoder is made (`training.py`,
`recurrent_training.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.companions.encoder import OnePassEncoder, TrainedEncoder
from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.checkpoint import load_checkpoint, model_of, save_checkpoint
from memvec.errors import MemvecError, check_minimum
from memvec.machine import plain_torch
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.model.precision import for_steps

CROSS_ENTROPY = Recipe(unit="logits", temperature=1.0, margin=0.0)
HELD_OUT = 0.02  # share of the text, at its end, that is never trained on
FEWEST_HELD_OUT = 68  # tokens
CHECKPOINT_EVERY = 50
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens per vector
RISE_ABOVE, FALL_BELOW = 0.88, 0.7  # teacher-forced accuracies at which a target length changes


@dataclass(frozen=True)
class TrainingPlan:
    """The choices of every training run. Raises MemvecError for a choice out of range."""

    steps: int = 2000
    slots: int = 1
    """Maximum number of vectors of a passage, or vectors of a recurrent encoder's memory."""
    positions: int = 2048
    """Positions of the frozen LM per step."""
    lr: float = 1e-3
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    seed: int = 0
    """Seed of weights and batches."""

    def __post_init__(self) -> None:
        self.at_least_1("steps", "slots", "positions")
        if not 0 < self.lr < 1:
            raise MemvecError(f"lr must be between 0 and 1, not {self.lr}.")

    def at_least_1(self, *names: str) -> None:
        """Raise MemvecError if one of these fields is below 1."""
        check_minimum(1, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class NetworkPlan(TrainingPlan):
    """The choices of a run whose encoder has a network beside the LM. Raises as `TrainingPlan`."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    size: float = 12.8
    """Scale of the vectors before training: a large one outlasts all layers (docs/log.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_1("hidden", "layers", "heads")
        if self.hidden % self.heads:
            raise MemvecError(
                f"hidden must be a multiple of {self.heads}, the heads, not {self.hidden}."
            )
        if not 0 < self.size < float("inf"):
            raise MemvecError(f"size must be a number above 0, not {self.size}.")


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a run, for a progress display."""

    step: int
    steps: int
    loss_bits: float  # mean bits per token of the last step
    accuracy: float  # teacher-forced, of the last step
    target: float  # see `TrainingRun.reached`
    seconds: float


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager that seeds torch's generator of the CPU, to initialise a network there.

    The caller's generator is restored afterwards; those of GPUs are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainingRun(ABC):
    """A training run that can be stopped at any time and resumed from its last checkpoint.

    `stream` holds the token ids (N,) of the text; its last 2 % are held out. The passages of step n
    depend only on the seed and n. Raises MemvecError for a text that is too short, a model without
    a split head, a loss that is not finite, or the partial file of another run.
    """

    reached = "tokens per vector"  # the unit of `target`, for the progress display
    network: nn.Module
    optimizer: torch.optim.Optimizer
    target: float

    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: TrainingPlan) -> None:
        if not lm.has_split_head:
            raise MemvecError(f"{lm.name} does not give its hidden states: no encoder for it.")
        self.lm, self.plan = lm, plan
        self.fast = for_steps(lm, "auto")  # the model that the loss is differentiated through
        cut = int(len(stream) * (1 - HELD_OUT))
        self.text, self.held_out = stream[:cut], stream[cut:]
        if len(self.held_out) < FEWEST_HELD_OUT:
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on: give more text, at "
                f"least {math.floor((FEWEST_HELD_OUT - 1) / HELD_OUT) + 1} tokens."
            )
        self.identity: dict[str, Any] = {
            "plan": asdict(plan),
            "model": model_of(lm),
            "text": hashlib.sha256(stream.to(torch.int32).numpy().tobytes()).hexdigest(),
        }
        rows: Tensor = lm.embedding.weight  # type: ignore[assignment]
        first = torch.arange(min(len(rows), 50_000), device=lm.device)
        with torch.no_grad():  # embeddings as the LM gets them: Gemma scales its own
            handed_in = lm.embedding(first).float()
        self.mean, self.std = handed_in.mean(0), float(handed_in.std())  # (D), scalar
        self.step, self.seconds = 0, 0.0

    def optimized(self, groups: Any) -> torch.optim.Optimizer:
        """AdamW for parameters, or for groups whose `rate` multiplies the plan's learning rate."""
        return torch.optim.AdamW(groups, lr=self.plan.lr, betas=(0.9, 0.98), weight_decay=0.01)

    # ------------------------------------------------------------------ the loop

    @plain_torch()
    def run(
        self,
        partial: Path | None = None,
        on_progress: Callable[[TrainingProgress], None] | None = None,
    ) -> TrainedEncoder:
        """Train to the last step; returns the encoder.

        With `partial`, a stopped run resumes from its last checkpoint there.
        """
        if partial is not None and partial.exists():
            self._load(partial)
        while self.step < self.plan.steps:
            began = time.perf_counter()
            loss, accuracy = self._train_step()
            self.seconds += time.perf_counter() - began
            if on_progress is not None:
                on_progress(
                    TrainingProgress(
                        self.step, self.plan.steps, loss, accuracy, self.target, self.seconds
                    )
                )
            # Also after the last step, since measuring the encoder takes minutes.
            last = self.step == self.plan.steps
            if partial is not None and (last or self.step % CHECKPOINT_EVERY == 0):
                self._save(partial)
        return self._finished()

    @abstractmethod
    def _train_step(self) -> tuple[float, float]:
        """Do one step; returns mean bits per token and teacher-forced accuracy."""

    @abstractmethod
    def _finished(self) -> TrainedEncoder:
        """The encoder after the last step."""

    def _descend(
        self, vectors: Float[Tensor, "B K D"], ids: Int[Tensor, "B T"]
    ) -> tuple[float, float]:
        """Do one step on the loss of passages `ids` given the encoder's vectors of them.

        Returns mean bits per token and teacher-forced accuracy.
        """
        states = self.fast.states(vectors, ids, "vectors")
        loss, accuracy, gradient = self._scored(states, ids)
        self._move([states], [gradient])
        return loss, accuracy

    def _scored(
        self, states: Float[Tensor, "B T H"], ids: Int[Tensor, "B T"]
    ) -> tuple[float, float, Float[Tensor, "B T H"]]:
        """Mean bits per token, teacher-forced accuracy, and gradient of the mean loss (nats)."""
        scores = score(self.fast.head, states, ids, CROSS_ENTROPY, V=self.lm.vocab_size)
        loss = float(scores.loss.mean()) / torch.log(torch.tensor(2.0)).item()
        if not loss < float("inf"):
            raise MemvecError(
                f"the loss was not finite at step {self.step + 1}: lower the learning rate (now "
                f"{self.plan.lr})."
            )
        accuracy = float((scores.margin > 0).float().mean())
        return loss, accuracy, scores.gradient.to(states.dtype) / ids.numel()

    def _move(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step of the optimiser, from the gradients with respect to `outputs` of the LM."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("rate", 1.0) * self.plan.lr * self._rate()
        torch.autograd.backward(outputs, gradients)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def best_length(self, encoder: OnePassEncoder, longest: int, n: int = 64) -> int:
        """The length (tokens) with the largest mean horizon after one pass.

        Each length is measured on `n` held-out passages with one vector each. No length exceeds
        `longest` or the number of held-out tokens.
        """
        best, best_mean = 1, -1.0
        for T in (t for t in GRID if t <= min(longest, len(self.held_out))):
            ids = self._windows(self.held_out, n, T, self._generator("length", T))
            vectors = encoder.encode(self.lm, ids, 1)
            decoded = torch.tensor(decode_ids(self.lm, vectors, [T] * n))
            mean = float(horizon(decoded == ids.cpu()).float().mean())
            if mean > best_mean:
                best, best_mean = T, mean
        return best

    def _rate(self) -> float:
        """Factor of the learning rate: rises over `warmup`, then falls linearly to 0.01."""
        remaining = 1 - self.step / self.plan.steps
        return min((self.step + 1) / max(1, self.plan.warmup), 0.01 + 0.99 * remaining)

    # ------------------------------------------------------------------ text and files

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.plan.seed}/{purpose}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _windows(
        self, stream: Int[Tensor, " N"], count: int, T: int, draw: torch.Generator
    ) -> Int[Tensor, "count T"]:
        starts = torch.randint(len(stream) - T + 1, (count, 1), generator=draw)
        return stream[starts + torch.arange(T)].to(self.lm.device)

    def _save(self, partial: Path) -> None:
        progress = [self.step, self.target, self.seconds]
        save_checkpoint(partial, self.identity, self.network, self.optimizer, progress)

    def _load(self, partial: Path) -> None:
        step, self.target, self.seconds = load_checkpoint(
            partial, self.identity, self.network, self.optimizer
        )
        self.step = int(step)
