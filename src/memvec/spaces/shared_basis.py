"""Input vectors z W with a basis W that all passages share; only the coefficients z are stored.

W (d, D) has orthogonal rows. It is drawn from the recipe's seed and never trained or stored, so d
numbers determine a vector. (The coordinates 'low-dim' also train a matrix for each passage, and
store the D numbers of the vector.) Rows have length sqrt(D / d), so a vector has the same RMS as
its coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import Reading, StartRule


class SharedBasis(Reading):
    """The space of d coefficients per vector. `options`: `dimensions` (d) and `seed`, integers.

    Raises MemvecError unless d is from 1 to D and the seed is an integer of 64 bits.
    """

    space = "shared-basis"

    def __init__(self, lm: FrozenLM, options: Mapping[str, Any]) -> None:
        d, seed = options.get("dimensions"), options.get("seed")
        if not isinstance(d, int) or not 1 <= d <= lm.width or not isinstance(seed, int):
            raise MemvecError(
                f"an input vector of {lm.name} has {lm.width} numbers, so a shared basis has 1 to "
                f"{lm.width} dimensions, not {d}: change the recipe's dimensions."
            )
        if abs(seed) >= 2**63:
            raise MemvecError(f"the seed of a shared basis must fit 64 bits; {seed} does not.")
        self.options = {"dimensions": d, "seed": seed}
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(lm.width, d, generator=generator, dtype=torch.float64)
        rows = torch.linalg.qr(drawn).Q.T * (lm.width / d) ** 0.5
        self.basis = rows.float().to(lm.device)  # copying it at each step would make a GPU wait

    def numbers(self, lm: FrozenLM) -> int:
        """d, the number of coefficients of a vector."""
        return len(self.basis)

    def vectors_of(self, z: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape D"]:
        """The input vectors z W of coefficients z."""
        vectors: Tensor = z.float() @ self.basis.to(z.device)
        return vectors

    def begun_at(self, lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "K d"]:
        """The coefficients whose input vectors are nearest to `vectors`."""
        d, D = self.basis.shape
        nearest: Tensor = vectors.float() @ self.basis.T.to(vectors.device) * (d / D)
        return nearest

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K d"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """The inputs of `Reading`, with vectors computed from the coefficients."""
        vectors = None if vectors is None else self.vectors_of(vectors)
        return super().inputs(lm, vectors, ids, start_rule)

    def opening(
        self, lm: FrozenLM, vectors: Float[Tensor, "B K d"], given: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B N D"], Callable[[], Any]]:
        """The opening of `Reading`, with vectors computed from the coefficients."""
        return super().opening(lm, self.vectors_of(vectors), given)
