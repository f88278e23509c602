"""Common parts of training an encoder with a frozen LM: its plan, its text, its loss.

The encoder's vectors take the place of crammed vectors, the frozen LM predicts a passage from them,
and the loss is differentiated through the LM into the encoder. Each kind of encoder adds its
network, the vectors and passages of a step, and how the finished encoder is made (`training.py`,
`recurrent_training.py`). The loop over the steps is that of `resumable.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.encoder import OnePassEncoder, TrainedEncoder
from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.checkpoint import model_of
from memvec.encoders.resumable import ResumableRun, RunPlan, check_heads, check_size
from memvec.errors import MemvecError
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM

CROSS_ENTROPY = Recipe(unit="logits", temperature=1.0, margin=0.0)
HELD_OUT = 0.02  # share of the text, at its end, that is never trained on
FEWEST_HELD_OUT = 68  # tokens
MEASURED = 64  # held-out passages of each length that is measured
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens per vector
RISE_ABOVE, FALL_BELOW = 0.88, 0.7  # teacher-forced accuracies at which a target length changes


@dataclass(frozen=True)
class TrainingPlan(RunPlan):
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
        self.check_rate()


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
        check_heads(self.hidden, self.heads)
        check_size(self.size)


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


class TrainingRun(ResumableRun[TrainingProgress, TrainedEncoder]):
    """A training run of an encoder.

    `stream` holds the token ids (N,) of the text; its last 2 % are held out. Raises MemvecError as
    `ResumableRun`, for a text that is too short, and for a model without a split head.
    """

    counters = ("step", "target", "seconds")
    reached = "tokens per vector"  # the unit of `target`, for the progress display
    plan: TrainingPlan
    target: float

    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: TrainingPlan) -> None:
        if not lm.has_split_head:
            raise MemvecError(f"{lm.name} does not give its hidden states: no encoder for it.")
        super().__init__(lm, plan)
        cut = int(len(stream) * (1 - HELD_OUT))
        self.text, self.held_out = stream[:cut], stream[cut:]
        if len(self.held_out) < FEWEST_HELD_OUT:
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on: give more text, at "
                f"least {math.floor((FEWEST_HELD_OUT - 1) / HELD_OUT) + 1} tokens."
            )
        self.identity = {
            "plan": asdict(plan),
            "model": model_of(lm),
            "text": hashlib.sha256(stream.to(torch.int32).numpy().tobytes()).hexdigest(),
        }
        rows: Tensor = lm.embedding.weight  # type: ignore[assignment]
        first = torch.arange(min(len(rows), 50_000), device=lm.device)
        with torch.no_grad():  # embeddings as the LM gets them: Gemma scales its own
            handed_in = lm.embedding(first).float()
        self.mean, self.std = handed_in.mean(0), float(handed_in.std())  # (D), scalar

    @abstractmethod
    def _train_step(self) -> tuple[float, float]:
        """Do one step; returns mean bits per token and teacher-forced accuracy."""

    def _progress(self, measured: tuple[float, float], checkpoint: bool) -> TrainingProgress:
        return TrainingProgress(
            self.step, self.plan.steps, *measured, target=self.target, seconds=self.seconds
        )

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
        self._need_finite(loss)
        accuracy = float((scores.margin > 0).float().mean())
        return loss, accuracy, scores.gradient.to(states.dtype) / ids.numel()

    def _follow(self, share: float, accuracy: float, longest: float) -> None:
        """Move the target length after a step on passages of `share` times that length.

        It rises by 2 %, to `longest` at most, after accurate long passages, and falls by as much
        after inaccurate short ones.
        """
        if share > 0.8 and accuracy > RISE_ABOVE:
            self.target = min(self.target * 1.02, longest)
        elif share < 1.2 and accuracy < FALL_BELOW:
            self.target = max(self.target / 1.02, 1.0)

    @torch.no_grad()
    def best_length(self, encoder: OnePassEncoder, longest: int) -> int:
        """The length (tokens) with the largest mean horizon after one pass.

        Each length is measured on held-out passages with one vector each. No length exceeds
        `longest` or the number of held-out tokens.
        """
        n, best, best_mean = MEASURED, 1, -1.0
        for T in (t for t in GRID if t <= min(longest, len(self.held_out))):
            ids = self._windows(self.held_out, n, T, self._generator("length", T))
            vectors = encoder.encode(self.lm, ids, 1)
            decoded = torch.tensor(decode_ids(self.lm, vectors, [T] * n))
            mean = float(horizon(decoded == ids.cpu()).float().mean())
            if mean > best_mean:
                best, best_mean = T, mean
        return best

    def _windows(
        self, stream: Int[Tensor, " N"], count: int, T: int, draw: torch.Generator
    ) -> Int[Tensor, "count T"]:
        starts = torch.randint(len(stream) - T + 1, (count, 1), generator=draw)
        return stream[starts + torch.arange(T)].to(self.lm.device)
