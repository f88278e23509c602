"""How a model reads [mem] vectors: the inputs of training, and the inputs of free decoding.

The base class `Reading` puts the vectors in front of the passage, which is decoded token by token.
memvec.arms.one_step has two readings that decode a passage in one forward pass.

Each FrozenLM has one reading (`FrozenLM.reading`). The engine, certification and files use it.

A *space* defines the numbers of a vector that are trained and stored: the D numbers of an input
(`inputs`), or W other numbers, from which a reading of memvec.spaces computes what the model reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import registry
from memvec.errors import MemvecError, did_you_mean

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

StartRule = Literal["vectors", "bos", "first-token"]
START_RULES: tuple[StartRule, ...] = get_args(StartRule)
Layout = Literal["prefix", "one-step", "one-step-shared"]


class Reading:
    """[vectors, (BOS,) t_1 ... t_{T-1}]: the vectors in front of the passage (Kuratov et al.)."""

    layout: Layout = "prefix"
    fixed_vectors: int | None = None  # required number of vectors; None: any
    feeds_back: bool = True  # decoding feeds each token back as an input
    shares_vector: bool = False  # all passages have one vector in common
    job_type: Any = None  # subclass of CramJob for such passages; None: CramJob itself
    enlarges: bool = True  # recipes may enlarge the vectors (`Recipe.lr_large`)
    predicts: bool = True  # the last vector predicts the token after it
    space: str = "inputs"  # the name of the space
    start_rules: tuple[StartRule, ...] = START_RULES  # supported start rules
    options: Mapping[str, Any] = {}  # options that a file stores, to build the space again

    def numbers(self, lm: FrozenLM) -> int:
        """The number of trained and stored numbers per vector (W)."""
        return lm.width

    def begun_at(self, lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "K W"]:
        """The start in this space: the numbers whose vectors are nearest to these input vectors."""
        return vectors

    def states(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K W"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule,
    ) -> Float[Tensor, "B N H"]:
        """Hidden states at the predicting positions (N as in `FrozenLM.states`)."""
        keep, cache = ids.shape[1] - (start_rule == "first-token"), self.cache(lm, vectors)
        return lm.states_of(self.inputs(lm, vectors, ids, start_rule), keep, cache)

    def cache(self, lm: FrozenLM, vectors: Float[Tensor, "B K W"] | None) -> Any:
        """The model's cache in front of the inputs; None: an empty cache."""
        return None

    def opening(
        self, lm: FrozenLM, vectors: Float[Tensor, "B K W"], given: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B N D"], Callable[[], Any]]:
        """The first inputs of free decoding, and a function that makes the cache in front of them.

        `given` are the tokens after the vectors. The function returns None for an empty cache.
        """
        inputs = torch.cat([lm.after_front(vectors.to(lm.device)), lm.embed(given)], dim=1)
        return inputs, lambda: self.cache(lm, vectors)

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """The inputs of a teacher-forced pass: the model's front, the vectors, and tokens.

        `start_rule` says what is between the vectors and the first predicted token: nothing
        ('vectors': the last vector predicts token 1), BOS or another trigger ('bos'), or the
        passage's first token ('first-token': tokens 2 to T are predicted). Without vectors, use
        'bos' or 'first-token'. Raises MemvecError for 'bos' without a BOS token and for an unknown
        rule.
        """
        if start_rule not in START_RULES:
            raise MemvecError(
                f"unknown start rule '{start_rule}': {did_you_mean(start_rule, START_RULES)}"
            )
        parts = [] if vectors is None else [lm.after_front(vectors)]
        if start_rule == "bos":
            parts.append(lm.embed(lm.start_ids(ids, start_rule, alone=vectors is None)))
        parts.append(lm.embed(ids[:, :-1]))
        return torch.cat(parts, dim=1)

    def inputs_before(self, K: int, start_rule: StartRule) -> int:
        """Number of inputs of a forward pass besides one for each predicted token."""
        return K - 1 + (start_rule != "vectors")

    def context(self, lm: FrozenLM) -> int | None:
        """Largest number of inputs that the model can read; None without a limit."""
        return lm.context

    def rows(self, vectors: Float[Tensor, "P K D"]) -> Float[Tensor, "R k D"]:
        """The rows that a file stores for the vectors of P passages."""
        return vectors

    def vectors(self, rows: Float[Tensor, "R k D"]) -> Float[Tensor, "P K D"]:
        """The vectors of P passages, from the stored rows."""
        return rows

    def row_count(self, passages: int) -> int:
        """Number of stored rows for a number of passages: a vector that all share is one more."""
        return passages + self.shares_vector


IN_FRONT = Reading()


def in_front(lm: FrozenLM, options: Mapping[str, Any]) -> Reading:
    """The space `inputs`: the model's own reading."""
    return lm.reading


def in_space(lm: FrozenLM, name: str, options: Mapping[str, Any]) -> FrozenLM:
    """A view of a model that reads its vectors in a registered space.

    `options` are those of a recipe's record or of a file. If `lm` is in this space with the same
    options, it is returned unchanged. Raises MemvecError if the model or its layout does not
    support the space.
    """
    alike = all(options.get(key, value) == value for key, value in lm.reading.options.items())
    if name == "inputs" or (name == lm.reading.space and alike):
        return lm
    if lm.reading.layout != "prefix":
        raise MemvecError(f"vectors read in one step are inputs: leave out the space '{name}'.")
    reading = registry.made("space", name, lm.read_as(IN_FRONT), options)
    if not isinstance(reading, Reading) or reading.space != name:
        raise MemvecError(
            f"the space '{name}' gives {type(reading).__name__}, not a Reading with this space."
        )
    return lm.read_as(reading)


@functools.cache
def reading_named(layout: str) -> Reading:
    """The reading of a layout. Raises MemvecError for an unknown one."""
    reading: Reading = IN_FRONT if layout == "prefix" else registry.get("layout", layout)()
    return reading
