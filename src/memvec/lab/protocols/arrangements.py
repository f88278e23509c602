"""Orders in which one forward pass can read e and m (arXiv 2505.21189, the ablation of inputs).

For N predicted tokens the paper tries [e] x N, [e] x N/2 [m] x N/2, [e, m] x N/2, [e][m] x N (one
input more than there are tokens, the first output is not used) and [e][m] x (N - 1), which is the
one that it keeps. Each is a reading of a model (`memvec.model.reading`). Only the last one can be
saved in a file, so only that one has a name in `memvec.model.reading`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.arms.one_step import OneStepReading
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule

Arrangement = Literal["e", "halves", "pairs", "m-for-each", "m-for-rest"]
FORMULAS = {
    "e": "[e] × N",
    "halves": "[e] × N/2 [m] × N/2",
    "pairs": "[e, m] × N/2",
    "m-for-each": "[e][m] × N",
    "m-for-rest": "[e][m] × (N − 1)",
}


class Arranged(OneStepReading):
    """Reads e and m in one of these orders; `length` (N of the spec) fixes where halves meet."""

    def __init__(self, arrangement: Arrangement, length: int) -> None:
        self.arrangement, self.length = arrangement, length
        self.fixed_vectors = 1 if arrangement == "e" else 2

    def order(self, tokens: int) -> list[int]:
        """The vector of each of `tokens` inputs, 0 for e and 1 for m.

        A shorter passage, and padding, get the beginning of the same order.
        """
        if self.arrangement == "e":
            return [0] * tokens
        if self.arrangement == "halves":
            return [int(i >= -(-self.length // 2)) for i in range(tokens)]
        if self.arrangement == "pairs":
            return [i % 2 for i in range(tokens)]
        ms = tokens if self.arrangement == "m-for-each" else tokens - 1
        return [0] + [1] * ms

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """The inputs (B, N, D): the vectors in this order, or without vectors the tokens as usual.

        Raises MemvecError for another number of vectors or a start rule that adds tokens.
        """
        if vectors is None:
            return super().inputs(lm, vectors, ids, start_rule)
        if vectors.shape[1] != self.fixed_vectors or start_rule != "vectors":
            raise MemvecError(
                f"the arrangement '{self.arrangement}' takes {self.fixed_vectors} vectors, and no "
                "tokens after them."
            )
        order = torch.tensor(self.order(ids.shape[1]), device=vectors.device)
        return vectors.to(lm.dtype)[:, order]

    def inputs_before(self, K: int, start_rule: StartRule) -> int:
        """1 for [e][m] × N, whose first input predicts no token; 0 for the others."""
        return int(self.arrangement == "m-for-each")
