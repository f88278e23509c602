"""Bits needed for the arg-max against bits removed (`text_compression_upper_bound.ipynb`).

An ideal compressor would move just enough probability that every true token becomes the most
likely one. Raising the true token's logit by its deficit does that: from p to q / (1 - p + q),
where q is the best other token's probability. Positions that are right already need nothing.
The paper finds about half of what real vectors remove to be needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.lab.protocols.protocol import Protocol

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.model.reading import StartRule
    from memvec.passages.found import Found


def needed_bits(bits: Float[Tensor, " T"], margin: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Least bits per position that make the true token the arg-max.

    From its surprisal (bits) and its margin (logits): p = 2^-bits and q = p e^-margin.
    """
    p = torch.exp2(-bits.double())
    q = p * torch.exp(-margin.double())
    raised = q / (1 - p + q)
    return torch.where(margin > 0, torch.zeros_like(p), torch.log2(raised / p))


class UpperBound(Protocol):
    """Needed against removed."""

    name = "upper-bound"
    extras = {"needed_bits": "least bits that make every true token the arg-max"}  # noqa: RUF012

    def extra(
        self,
        lm: FrozenLM,
        found: Found,
        vectors: Tensor,
        start: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        from memvec.cramming.certify import positions

        scores = positions(lm, vectors[None].float(), [found.passage], start)
        return {"needed_bits": float(needed_bits(scores.lm_bits[0], scores.lm_margin[0]).sum())}
