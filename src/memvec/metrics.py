"""The metrics of cramming, as pure functions of tensors and numbers.

The definitions are those of Kuratov et al., "Cramming 1568 Tokens into a Single Vector and Back
Again" (ACL 2025), section 3, with two corrections: information is in bits (the published figures
are nats), and sums with and without vectors run over the same positions. Letters: B passages, K
[mem] vectors, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LN2 = math.log(2.0)
SYNCHRONOUS_DEVICES = {"cpu"}  # devices whose values can be read without synchronisation
TIED = float(torch.finfo(torch.float32).tiny)  # margin of a tie in which the arg-max is right


def surprisal(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-log2 p(t_i | ...) of each token, bits; computed in float32 or wider."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    true = logits.gather(-1, ids[..., None])[..., 0]
    return (logits.logsumexp(-1) - true) / LN2


def margins(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The logit of the true token minus the best other logit; > 0 where the arg-max is right."""
    true = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], -torch.inf)
    margin = (true - others.amax(-1, keepdim=True))[..., 0]
    return first_of_ties(margin, logits, ids)


def first_of_ties(
    margin: Float[Tensor, "*shape"], logits: Float[Tensor, "*shape V"], ids: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Margins (logits) in which a tie is `TIED` if the arg-max is the true token, and 0 if not.

    Logits in bfloat16 are often equal. Greedy decoding and the arg-max of the published accuracies
    take the first of equal tokens.
    """
    tied = margin == 0
    if margin.device.type not in SYNCHRONOUS_DEVICES:
        return torch.where(tied & (logits.argmax(-1) == ids), TIED, margin)
    if not bool(tied.any()):
        return margin
    first = torch.zeros_like(tied)
    first[tied] = logits[tied].argmax(-1) == ids[tied]
    return torch.where(first, TIED, margin)


def horizon(right: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Number of leading positions that are right."""
    return right.long().cumprod(-1).sum(-1)


def teacher_forced_accuracy(right: Bool[Tensor, " T"]) -> float:
    """The share of positions whose arg-max is right when the true earlier tokens are given."""
    return float(right.double().mean())


def token_gain(right: Bool[Tensor, " T"], right_without: Bool[Tensor, " T"]) -> int:
    """Right positions with the vectors minus right positions without (section 3, eq. 3), tokens."""
    return int(right.sum() - right_without.sum())


def information_gain(bits: Float[Tensor, " T"], bits_without: Float[Tensor, " T"]) -> float:
    """H_LM - H_mem in bits over the same positions (section 3, eq. 4, divided by ln 2)."""
    return float(bits_without.double().sum() - bits.double().sum())


def theoretical_capacity(D: int, K: int, bits_per_number: float | int, V: int) -> float:
    """K D b / log2 V, in tokens, for b bits per number (section 3, eq. 5)."""
    return K * D * bits_per_number / math.log2(V)


def token_utilisation(
    gain: float | int, D: int, K: int, bits_per_number: float | int, V: int
) -> float:
    """Token gain over theoretical capacity, as the paper reports it (Figure 5)."""
    return gain / theoretical_capacity(D, K, bits_per_number, V)


def bit_utilisation(gain_bits: float, D: int, K: int, bits_per_number: float | int) -> float:
    """Information gain (bits) divided by the number of bits of the vectors."""
    return gain_bits / (K * D * bits_per_number)


def bits_per_dimension(gain_bits: float, D: int, K: int) -> float:
    """Information gain per number of the vectors, bits."""
    return gain_bits / (K * D)


def mean_and_error(values: Sequence[float | int]) -> tuple[float, float]:
    """Mean and its standard error (NaN for fewer than two values)."""
    data = np.asarray(values, dtype=float)
    n = len(data)
    mean = float(data.mean()) if n else math.nan
    return mean, float(data.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
