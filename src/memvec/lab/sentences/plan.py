"""The options of the training of a latent model, and their check against a frozen LM."""

from __future__ import annotations

from dataclasses import dataclass

from memvec.encoders.resumable import RunPlan, check_heads
from memvec.errors import MemvecError, check_minimum, did_you_mean
from memvec.lab.sentences.latents import need_encoder
from memvec.model.lm import FrozenLM

LOSSES = ("tokens", "latents", "both")


@dataclass(frozen=True)
class LatentPlan(RunPlan):
    """The options of a training run. Raises MemvecError for a value out of range."""

    steps: int = 1000
    vectors: int = 3
    """Vectors of a sentence (K)."""
    max_tokens: int = 45
    """Tokens of a sentence; longer ones are cut."""
    window: int = 16
    """Sentences of a sequence."""
    batch: int = 4
    """Sequences of a step."""
    hidden: int = 384
    layers: int = 3
    heads: int = 6
    loss: str = "tokens"
    """One of LOSSES."""
    lr: float = 1e-3
    warmup: int = 50
    sentences: int = 30_000
    """Maximum number of encoded sentences; as many from the start of each document."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.at_least_1("steps", "vectors", "max_tokens", "batch", "hidden", "layers", "heads")
        check_minimum(2, window=self.window, sentences=self.sentences)
        check_heads(self.hidden, self.heads)
        self.check_rate()
        if self.loss not in LOSSES:
            raise MemvecError(f"unknown loss '{self.loss}': {did_you_mean(self.loss, LOSSES)}")


def check_sizes(lm: FrozenLM, plan: LatentPlan) -> None:
    """Raise MemvecError if the encoder or the context is too small for the longest sentence.

    Also for a model without an encoder, or one that does not give its hidden states.
    """
    encoder, K = need_encoder(lm), plan.vectors
    if not lm.has_split_head:
        raise MemvecError(f"{lm.name} does not give its hidden states: no latent model for it.")
    if encoder.tokens and plan.max_tokens > encoder.tokens * K:
        raise MemvecError(
            f"max_tokens must be at most {encoder.tokens * K}, which the encoder of {lm.name} "
            f"reads into {K} vector(s), not {plan.max_tokens}: lower it, or use more vectors."
        )
    if lm.context is not None and plan.max_tokens + K > lm.context:
        raise MemvecError(
            f"sentences of {plan.max_tokens} tokens and {K} vector(s) do not fit the context of "
            f"{lm.name} ({lm.context} tokens)."
        )
