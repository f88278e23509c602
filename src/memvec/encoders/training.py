"""Training a slot encoder beside a frozen LM: encode a passage, give it back, cross-entropy.

It learns from text and the LM's own gradient: vectors of the encoder stand where crammed
vectors would, the frozen LM predicts the passage from them, and the loss goes back through it into
the encoder. Passages grow with success, so that the encoder trains near the length it can reach.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.slots import SlotEncoder, SlotNetwork
from memvec.errors import MemvecError, check_minimum
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.model.precision import for_steps
from memvec.writing import write_atomically

CROSS_ENTROPY = Recipe(unit="logits", temperature=1.0, margin=0.0)
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
RISE_ABOVE, FALL_BELOW = 0.88, 0.7  # teacher-forced accuracy that moves the target length
HELD_OUT = 0.02  # share of the text, at its end, that is never trained on
CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class TrainingPlan:
    """Every choice of a training run. Lengths in tokens per vector."""

    steps: int = 2000
    slots: int = 1
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    positions: int = 2048
    """Positions of the frozen LM per step."""
    lr: float = 1e-3
    size: float = 12.8
    """Scale of the vectors before training: a large one outlasts all layers (docs/log.md)."""
    warmup: int = 50
    first_target: float = 2.0
    longest: float = 2.0
    """Largest length of a passage, as a multiple of the target length."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "slots", "hidden", "layers", "heads", "positions"):
            check_minimum(1, **{name: getattr(self, name)})
        if self.hidden % self.heads:
            raise MemvecError(f"--hidden {self.hidden} is no multiple of --heads {self.heads}.")
        if not 0 < self.size < float("inf"):
            raise MemvecError(f"--size must be a number above 0, not {self.size}.")
        if not 0 < self.lr < 1:
            raise MemvecError(f"--lr must be between 0 and 1, not {self.lr}.")


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a run, for a progress display."""

    step: int
    steps: int
    loss_bits: float  # mean bits per token of the last step
    accuracy: float  # teacher-forced, of the last step
    target: float  # tokens per vector that it is trained on now
    seconds: float


class Training:
    """A run that can be stopped after any checkpoint and resumed.

    `stream`: token ids (N,) of the text. Its last 2 % are held out. What step n trains on depends
    on the seed and on n alone. Raises MemvecError: text too short, loss not finite, a partial file
    of another run.
    """

    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: TrainingPlan) -> None:
        if not lm.has_split_head:
            raise MemvecError(f"{lm.name} does not give its hidden states: no encoder for it.")
        self.lm, self.plan = lm, plan
        self.fast = for_steps(lm, "auto")  # the model that the loss is differentiated through
        cut = int(len(stream) * (1 - HELD_OUT))
        self.text, self.held_out = stream[:cut], stream[cut:]
        if len(self.held_out) < 4 * GRID[0] + 64:
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on: give more text."
            )
        self.identity = {
            "plan": asdict(plan),
            "weights": lm.fingerprint.weights,
            "text": hashlib.sha256(stream.to(torch.int32).numpy().tobytes()).hexdigest(),
        }
        torch.manual_seed(plan.seed)
        mean = lm.embedding.weight.detach()[:50_000].float().mean(0)  # type: ignore[union-attr,operator,index]
        shape = {k: getattr(plan, k) for k in ("hidden", "layers", "heads", "slots")}
        self.network = SlotNetwork(lm.width, **shape).to(lm.device)
        self.network.scaled(mean, lm.embedding_std, plan.size)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step, self.target, self.seconds = 0, plan.first_target, 0.0
        room = (lm.context or GRID[-1] + plan.slots) - plan.slots
        self.longest = min(GRID[-1], room // plan.slots, len(self.held_out) // (2 * plan.slots))
        if self.longest < 1:
            raise MemvecError(
                f"--slots {plan.slots} leave no room for text in {lm.name}'s context, or the text "
                "is too short for them: use fewer."
            )

    # ------------------------------------------------------------------ the loop

    def run(
        self,
        partial: Path | None = None,
        on_progress: Callable[[TrainingProgress], None] | None = None,
    ) -> SlotEncoder:
        """Train to the last step; returns the encoder, with its best length.

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
            if partial is not None and self.step % CHECKPOINT_EVERY == 0:
                self._save(partial)
        encoder = SlotEncoder(self.network.eval())
        encoder.tokens = self._best_length(encoder)
        return encoder

    def _train_step(self) -> tuple[float, float]:
        """One step; mean bits per token and teacher-forced accuracy."""
        plan, lm = self.plan, self.fast
        draw = self._generator("step", self.step)
        K = int(torch.randint(1, plan.slots + 1, (), generator=draw))
        share = 0.5 + (plan.longest - 0.5) * float(torch.rand((), generator=draw))
        T = K * min(max(1, round(share * self.target)), self.longest)
        ids = self._windows(self.text, max(1, plan.positions // (T + K)), T, draw)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * self._rate()
        vectors = self.network(lm.embed(ids), K)
        states = lm.states(vectors, ids, "vectors")
        scores = score(lm.head, states, ids, CROSS_ENTROPY, V=lm.vocab_size)
        loss = float(scores.loss.mean()) / torch.log(torch.tensor(2.0)).item()
        if not loss < float("inf"):
            raise MemvecError(
                f"the loss was not finite at step {self.step + 1}: lower --lr (now {plan.lr})."
            )
        states.backward(scores.gradient.to(states.dtype) / ids.numel())  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        accuracy = float((scores.margin > 0).float().mean())
        if share > 0.8 and accuracy > RISE_ABOVE:
            self.target = min(self.target * 1.02, float(self.longest))
        elif share < 1.2 and accuracy < FALL_BELOW:
            self.target = max(self.target / 1.02, 1.0)
        return loss, accuracy

    def _rate(self) -> float:
        """Share of the learning rate: up over `warmup`, then down to a hundredth along a line."""
        left = 1 - self.step / self.plan.steps
        return min((self.step + 1) / self.plan.warmup, 0.01 + 0.99 * left)

    # ------------------------------------------------------------------ the best length

    @torch.no_grad()
    def _best_length(self, encoder: SlotEncoder, n: int = 64) -> int:
        """The length with the largest mean horizon (tokens) of one pass, on held-out text."""
        best, best_mean = 1, -1.0
        for T in (t for t in GRID if t <= self.longest):
            ids = self._windows(self.held_out, n, T, self._generator("length", T))
            vectors = encoder.encode(self.lm, ids, 1)
            decoded = torch.tensor(decode_ids(self.lm, vectors, [T] * n))
            mean = float(horizon(decoded == ids.cpu()).float().mean())
            if mean > best_mean:
                best, best_mean = T, mean
        return best

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
        state = {
            "identity": self.identity,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.step, self.target, self.seconds],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(partial, buffer.getvalue())

    def _load(self, partial: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(partial, weights_only=True, map_location="cpu")
            same = state["identity"] == self.identity
        except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError):
            raise MemvecError(f"{partial} cannot be read: delete it to start over.") from None
        if not same:
            raise MemvecError(
                f"{partial} is of a run with another model, text or settings: delete it to start "
                "over."
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        step, self.target, self.seconds = state["progress"]
        self.step = int(step)
