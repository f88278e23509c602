"""How a model reads [mem] vectors: what stands before each predicted token, and how it is decoded.

`Prefix` puts the vectors in front of the passage, which is decoded token by token; memvec.arms has
two that decode a passage in one forward pass.

A model has one reading (`FrozenLM.reading`); the engine, certification, metrics and files ask it.

A *space* says which numbers of a vector are trained and stored: those of an input (`inputs`, D of
them), or W others that a reading of memvec.spaces makes something of that the model reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import registry
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

StartRule = Literal["vectors", "bos", "first-token"]
START_RULES: tuple[StartRule, ...] = get_args(StartRule)
Layout = Literal["prefix", "one-step", "one-step-shared"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Prefix:
    """[vectors, (BOS,) t_1 ... t_{T-1}]: the vectors in front of the passage (Kuratov et al.)."""

    layout: Layout = "prefix"
    fixed_vectors: int | None = None  # the number of vectors it takes, None for any
    feeds_back: bool = True  # each decoded token is read before the next
    crammer: Any = None  # what crams all passages together, where they share one vector
    enlarges: bool = True  # vectors may be made large, and move in large steps
    predicts: bool = True  # the last vector predicts the token behind it
    space: str = "inputs"  # where the numbers of a vector stand
    start_rules: tuple[StartRule, ...] = START_RULES
    options: Mapping[str, Any] = {}  # what a file keeps of the space, to make it again

    def numbers(self, lm: FrozenLM) -> int:
        """Numbers of a vector (W), as they are trained and stored."""
        return lm.width

    def begun_at(self, lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "K W"]:
        """The numbers that stand for input vectors, or nearly: where a passage begins."""
        return vectors

    def states(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K W"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule,
    ) -> Float[Tensor, "B N H"]:
        """Hidden states at the predicting positions."""
        keep, cache = ids.shape[1] - (start == "first-token"), self.cache(lm, vectors)
        return lm.states_of(self.inputs(lm, vectors, ids, start), keep, cache)

    def cache(self, lm: FrozenLM, vectors: Float[Tensor, "B K W"] | None) -> Any:
        """What the model's cache holds before its inputs; None: nothing."""
        return None

    def states_as_context(
        self, lm: FrozenLM, vectors: Float[Tensor, "B K W"], ids: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B N H"]:
        """States that predict other tokens than the passage's, right behind the vectors.

        N = L; L - 1 where the vectors predict nothing, for then the first token is given. The
        vectors are multiplied by the model's `context_scale`.
        """
        rule: StartRule = "vectors" if self.predicts else "first-token"
        return self.states(lm, lm.context_scale * vectors, ids, rule)

    def opening(
        self, lm: FrozenLM, vectors: Float[Tensor, "B K W"], given: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B N D"], Callable[[], Any]]:
        """What free decoding begins with: inputs, and what makes the cache that they stand behind
        (None for an empty one)."""
        inputs = torch.cat([lm.behind_front(vectors.to(lm.device)), lm.embed(given)], dim=1)
        return inputs, lambda: self.cache(lm, vectors)

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """What stands before each predicted token; in front of the vectors, the model's `front`.

        `start` says what follows the vectors: nothing ('vectors': token 1 is predicted from the
        last vector), the model's BOS or the trigger that stands for it ('bos'), or the
        passage's first token ('first-token': tokens 2 to T are predicted). Without vectors,
        'vectors' means nothing, and BOS is used.
        """
        parts = [] if vectors is None else [lm.behind_front(vectors)]
        if start == "bos":
            if vectors is not None:
                before = lm.start_ids(ids, start)
            elif lm.bos_id is not None:
                before = ids.new_full((len(ids), 1), lm.bos_id)
            else:
                raise MemvecError(f"{lm.name} has no BOS token: use --start-rule vectors.")
            parts.append(lm.embed(before))
        parts.append(lm.embed(ids[:, :-1]))
        return torch.cat(parts, dim=1)

    def inputs_before(self, K: int, start: StartRule) -> int:
        """Inputs that a forward pass reads besides one for each predicted token."""
        return K - 1 + (start != "vectors")

    def context(self, lm: FrozenLM) -> int | None:
        """Inputs that the model can use, None without a limit."""
        return lm.context

    def rows(self, vectors: Float[Tensor, "P K D"]) -> Float[Tensor, "R k D"]:
        """The rows that a file stores of the vectors of P passages."""
        return vectors

    def vectors(self, rows: Float[Tensor, "R k D"]) -> Float[Tensor, "P K D"]:
        """The vectors that stored rows stand for."""
        return rows

    def row_count(self, passages: int) -> int:
        """Stored rows of so many passages."""
        return passages


PREFIX = Prefix()


def in_front(lm: FrozenLM, options: Mapping[str, Any]) -> Prefix:
    """The space `inputs`: as the model reads vectors already."""
    return lm.reading


def in_space(lm: FrozenLM, name: str, options: Mapping[str, Any]) -> FrozenLM:
    """A model with its vectors in a space of the registry.

    `options` are a recipe's record, or what a file keeps. Raises MemvecError where the model, or
    its reading, has no such space.
    """
    if name in ("inputs", lm.reading.space):
        return lm
    if lm.layout != "prefix":
        raise MemvecError(f"vectors read in one step are inputs: leave out the space '{name}'.")
    return lm.read_as(registry.get("space", name)(lm.read_as(PREFIX), options))


@functools.cache
def reading_named(layout: str) -> Prefix:
    """The reading of a layout. Raises MemvecError for an unknown one."""
    reading: Prefix = PREFIX if layout == "prefix" else registry.get("layout", layout)()
    return reading
