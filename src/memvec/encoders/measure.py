"""Compares an encoder with cramming: exact passages after one pass, and the steps that it saves.

For each length: the share of held-out passages that are exact after one pass over all of their
tokens (free-running decoding), and how many steps cramming needs from the encoder's vectors and
from noise. In addition the two quantities that the paper contrasts: lossless tokens per vector in
one pass, and by cramming.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.machine import plain_torch
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import mean_interval


@dataclass(frozen=True)
class AtLength:
    """`n` passages of one length, one vector each.

    Steps are medians over all n; a passage that was never exact counts with the recipe's steps.
    """

    tokens: int
    n: int
    one_pass_exact: float  # share of passages
    one_pass_horizon: float  # mean horizon after one pass, tokens
    one_pass_interval: float  # 95 % half width of that mean (Student's t), NaN for one passage
    encoder_exact: float  # share, after cramming from the encoder's vectors
    encoder_steps: float
    noise_exact: float
    noise_steps: float


@dataclass(frozen=True)
class Comparison:
    """The results of all lengths, and lossless tokens per vector by one pass and by cramming."""

    rows: tuple[AtLength, ...]
    one_pass_lossless: int  # largest T at which at least half of the passages are exact, or 0
    crammed_horizon: float  # mean tokens per vector, default recipe from the encoder's vectors
    crammed_interval: float  # 95 % half width of that mean (Student's t), NaN for one passage
    crammed_n: int

    def record(self) -> dict[str, Any]:
        """The comparison as a dict."""
        return asdict(self)


@plain_torch()
def compare(
    lm: FrozenLM,
    passages: Int[Tensor, "n T"],
    lengths: Sequence[int],
    recipe: Recipe | None = None,
    batch_size: int = 32,
) -> Comparison:
    """Compare lm.encoder with cramming on passages that are cut to each of the lengths (tokens).

    Raises MemvecError if the model has no encoder, or a length exceeds the passages or the context.
    """
    if lm.encoder is None:
        raise MemvecError(
            f"{lm.name} has no one-pass encoder: train one with memvec encoder train."
        )
    recipe = recipe or Recipe()
    if not lengths or min(lengths) < 1 or max(lengths) > passages.shape[1]:
        raise MemvecError(f"lengths must be from 1 to {passages.shape[1]} tokens.")
    if lm.context is not None and max(lengths) > (max_tokens := lm.context - lm.encoder.beside):
        raise MemvecError(
            f"{max(lengths)} tokens do not fit the context of {lm.name} beside the vectors of the "
            f"encoder: at most {max_tokens}."
        )
    rows = tuple(_at_length(lm, passages[:, :T], recipe, batch_size) for T in sorted(set(lengths)))
    horizons = [
        float(o.metrics.horizon) for o in _cram(lm, passages, recipe, "encoder", batch_size)
    ]
    crammed = mean_interval(horizons)
    return Comparison(
        rows,
        max((row.tokens for row in rows if row.one_pass_exact >= 0.5), default=0),
        crammed.mean,
        (crammed.high - crammed.low) / 2,
        crammed.n,
    )


def _at_length(lm: FrozenLM, ids: Int[Tensor, "n T"], recipe: Recipe, batch_size: int) -> AtLength:
    n, T = ids.shape
    assert lm.encoder is not None
    vectors = lm.encoder.encode(lm, ids.to(lm.device), 1, whole=True)
    right = torch.tensor(decode_ids(lm, vectors, [T] * n)) == ids
    leading = mean_interval(horizon(right).tolist())
    by_start: dict[str, Any] = {}
    for start in ("encoder", "noise"):
        outcomes = _cram(lm, ids, recipe, start, batch_size)
        exact = [o.exact for o in outcomes]
        steps = [o.steps if o.exact else recipe.steps for o in outcomes]
        by_start[f"{start}_exact"] = sum(exact) / n
        by_start[f"{start}_steps"] = statistics.median(steps)
    return AtLength(
        tokens=T,
        n=n,
        one_pass_exact=float(right.all(1).float().mean()),
        one_pass_horizon=leading.mean,
        one_pass_interval=(leading.high - leading.low) / 2,
        **by_start,
    )


def _cram(
    lm: FrozenLM, ids: Int[Tensor, "n T"], recipe: Recipe, start: str, batch_size: int
) -> list[Outcome]:
    engine = Engine(lm, replace(recipe, start=start), vectors=1, batch_size=batch_size)
    return crammed_in_order(engine, ids.tolist())


def crammed_in_order(engine: Engine, passages: Sequence[Sequence[int]]) -> list[Outcome]:
    """The outcome of each passage of token ids; an engine yields them as they become ready."""
    numbered = [Passage(tuple(ids), number) for number, ids in enumerate(passages)]
    return sorted(engine.run(numbered), key=lambda outcome: outcome.passage.document)
