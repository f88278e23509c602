"""Read the front once: steps begin with a cache that holds its keys and values.

The front (BOS and soft tokens in front of the vectors) is the same for all passages and steps
(memvec.companions.around), and no input precedes it. So an engine computes its keys and values once
and puts them into the cache, as for a prefix (memvec.spaces.keys_values). States equal those of the
whole input, up to rounding.
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
    """Vectors in front of the passage, after a cache with the keys and values of the front.

    Raises MemvecError for a model whose keys and values cannot be passed in.
    """

    def __init__(self, lm: FrozenLM) -> None:
        self.keys_values = KeysValues(lm, {})
        self.front = self.keys_values.begun_at(lm, front_rows(lm)).to(lm.device)

    def cache(self, lm: FrozenLM, vectors: Float[Tensor, "B K D"] | None) -> Any:
        """A cache with the keys and values of the front for each row; None without vectors."""
        if vectors is None:
            return None
        return self.keys_values.cache(lm, self.front.expand(len(vectors), -1, -1))


def with_front_read(lm: FrozenLM) -> FrozenLM:
    """A view that reads its front from a cache; the model itself if this is not possible."""
    if not lm.front or type(lm.reading) is not Reading or lm.offload:
        return lm
    try:
        reading = AfterFront(lm)
    except MemvecError:  # its keys and values cannot be passed in
        return lm
    view = copy.copy(lm)
    view.reading, view.front = reading, ()
    return view
