"""How a model reads [mem] vectors: what stands before each predicted token, and how it is decoded.

`Prefix` puts the vectors in front of the passage, which is decoded token by token. `OneStep` is
Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation" (arXiv
2505.21189, EMNLP 2025): the model reads [e, m, m, ..., m], as many inputs as the passage has
tokens, and the output at position i is token i. Nothing is fed back, so nothing can be continued;
in the paper's tables two vectors hold about half of the tokens that one vector gives back token by
token. With a shared m, P passages are in P + 1 vectors.

A model has one reading (`FrozenLM.reading`); the engine, certification, metrics and files ask it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError, did_you_mean

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
    shares_m: bool = False  # all passages of a file share one vector

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """What stands before each predicted token.

        `start` says what follows the vectors: nothing ('vectors': token 1 is predicted from the
        last vector), the model's BOS or the trigger that stands for it ('bos'), or the
        passage's first token ('first-token': tokens 2 to T are predicted). Without vectors,
        'vectors' means nothing, and BOS is used.
        """
        parts = [] if vectors is None else [vectors.to(lm.dtype)]
        if start == "bos":
            token = lm.bos_id if vectors is None else lm.trigger
            if token is None:
                raise MemvecError(f"{lm.name} has no BOS token: use --start-rule vectors.")
            parts.append(lm.embed(ids.new_full((len(ids), 1), token)))
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


class OneStep(Prefix):
    """[e, m x (T - 1)] for vectors (B, 2, D): one forward pass gives all tokens of a passage."""

    layout: Layout = "one-step"
    fixed_vectors = 2
    feeds_back = False

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """[e, m x (T - 1)]; without vectors as any model reads its tokens.

        No input depends on a token: `ids` says how many there are. Raises MemvecError for another
        number of vectors or a start rule that gives tokens.
        """
        if vectors is None:
            return super().inputs(lm, vectors, ids, start)
        if vectors.shape[1] != 2:
            raise MemvecError(
                f"one-step decoding takes two vectors, e and m, not {vectors.shape[1]}."
            )
        if start != "vectors":
            raise MemvecError(
                "one-step decoding continues no given tokens: use --start-rule vectors, "
                f"not {start}."
            )
        vectors = vectors.to(lm.dtype)
        return torch.cat([vectors[:, :1], vectors[:, 1:].expand(-1, ids.shape[1] - 1, -1)], dim=1)

    def inputs_before(self, K: int, start: StartRule) -> int:
        """None: each input predicts a token."""
        return 0

    def context(self, lm: FrozenLM) -> int | None:
        """Less than the model's own where every layer sees a sliding window.

        Past the last position that e reaches, every window holds copies of m only, and every
        answer is the same.
        """
        config: Any = lm.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or []
        if not window or getattr(config, "use_sliding_window", True) is False:
            return lm.context
        if any("sliding" not in str(kind) for kind in kinds):
            return lm.context
        reach = int(config.num_hidden_layers) * (int(window) - 1) + 1
        return min(lm.context or reach + 2, reach + 2)


class OneStepSharedM(OneStep):
    """The same with one m for all passages of a file, stored once: [m, e_1 ... e_P]."""

    layout: Layout = "one-step-shared"
    shares_m = True

    def rows(self, vectors: Float[Tensor, "P K D"]) -> Float[Tensor, "R k D"]:
        """[m, e_1 ... e_P] as (P + 1, 1, D)."""
        return torch.cat([vectors[:1, 1:], vectors[:, :1]]).contiguous()

    def vectors(self, rows: Float[Tensor, "R k D"]) -> Float[Tensor, "P K D"]:
        """(e_p, m) of each passage."""
        return torch.cat([rows[1:], rows[:1].expand(len(rows) - 1, -1, -1)], dim=1).contiguous()

    def row_count(self, passages: int) -> int:
        """One for each passage, and one for m."""
        return passages + 1


PREFIX = Prefix()
READINGS: dict[str, Prefix] = {
    reading.layout: reading for reading in (PREFIX, OneStep(), OneStepSharedM())
}


def reading_named(layout: str) -> Prefix:
    """The reading of a layout. Raises MemvecError for an unknown one."""
    if layout not in READINGS:
        raise MemvecError(f"unknown layout '{layout}': {did_you_mean(layout, READINGS)}")
    return READINGS[layout]
