"""The front read once: steps begin after the keys and values of what stands before the vectors.

BOS and soft tokens in front of the vectors are the same for all passages and at every step
(memvec.companions.around). Nothing before them changes what the model computes for them, so their
keys and values are computed once for an engine and stand in its cache, as a prefix does
(memvec.spaces.keys_values). States are those of the whole input, up to rounding.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from memvec.companions.around import front_rows
from memvec.errors import MemvecError
from memvec.model.reading import Reading
from memvec.spaces.keys_values import KeysValues

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class AfterFront(Reading):
    """Vectors in front of the passage, after the keys and values of the model's front.

    Raises MemvecError for a model without keys and values that could be handed in again.
    """

    def __init__(self, lm: FrozenLM) -> None:
        self.held = KeysValues(lm, {})
        self.front = self.held.begun_at(lm, front_rows(lm)).to(lm.device)

    def cache(self, lm: FrozenLM, vectors: Float[Tensor, "B K D"] | None) -> Any:
        """Keys and values of the front for each row; without vectors there is none."""
        if vectors is None:
            return None
        return self.held.cache(lm, self.front.expand(len(vectors), -1, -1))


def with_front_read(lm: FrozenLM) -> FrozenLM:
    """The model whose inputs begin after its front; the model itself where it has none to keep."""
    if not lm.front or type(lm.reading) is not Reading or lm.offload:
        return lm
    try:
        reading = AfterFront(lm)
    except MemvecError:  # it keeps no keys and values, or reads them otherwise when handed in
        return lm
    view = copy.copy(lm)
    view.reading, view.front = reading, ()
    return view
