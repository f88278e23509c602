"""How a model reads one-step vectors: the same frozen model with other inputs.

The engine, the certification and the metrics see a model only through FrozenLM, and one-step
decoding differs from the ordinary kind in what stands before each predicted token and in nothing
else. So it is a view of a loaded model that lays out its inputs differently, and everything else
(slots, growing counted length, margins, records) is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError, did_you_mean
from memvec.model.lm import LAYOUTS, FrozenLM, Layout, StartRule
from memvec.model.memory import in_batches


class OneStep(FrozenLM):
    """A view of a loaded model that reads (e, m) as [e, m, m, ..., m]; the weights are shared.

    It has no encoder and no measured bits per vector: those are for vectors in front of a passage.
    """

    layout = "one-step"

    def __init__(self, lm: FrozenLM) -> None:
        self.__dict__.update(vars(lm))
        self.facts, self.encoder = {}, None
        if (reach := _reach(lm)) is not None:
            self.context = min(self.context or reach + 2, reach + 2)

    def inputs(
        self,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """[e, m x (T - 1)] for vectors (B, 2, D); without vectors as any model reads its tokens.

        No input depends on a token: `ids` says how many there are. Raises MemvecError for another
        number of vectors or a start rule that gives tokens.
        """
        if vectors is None:
            return super().inputs(vectors, ids, start)
        if vectors.shape[1] != 2:
            raise MemvecError(
                f"one-step decoding takes two vectors, e and m, not {vectors.shape[1]}."
            )
        if start != "vectors":
            raise MemvecError(
                "one-step decoding continues no given tokens: use --start-rule vectors, "
                f"not {start}."
            )
        vectors = vectors.to(self.dtype)
        return torch.cat([vectors[:, :1], vectors[:, 1:].expand(-1, ids.shape[1] - 1, -1)], dim=1)

    def inputs_before(self, K: int, start: StartRule) -> int:
        """None: each input predicts a token."""
        return 0


def laid_out(lm: FrozenLM, layout: str) -> FrozenLM:
    """The model as vectors of this layout need it. Raises MemvecError for an unknown layout."""
    if laid_out_as(layout) == "prefix" or isinstance(lm, OneStep):
        return lm
    return OneStep(lm)


def laid_out_as(layout: str) -> Layout:
    """A layout by its name. Raises MemvecError for an unknown one."""
    for known in LAYOUTS:
        if layout == known:
            return known
    raise MemvecError(f"unknown layout '{layout}': {did_you_mean(layout, LAYOUTS)}")


@torch.no_grad()
def decode_at_once(
    lm: FrozenLM,
    vectors: Float[Tensor, "P K D"],
    lengths: Sequence[int],
    start: StartRule,
    batch: int,
) -> list[list[int]]:
    """Token ids of P passages, `lengths[p]` of them each, in one forward pass for each batch.

    Nothing is fed back: a wrong token does no harm to the next one, and nothing can be continued.
    Where memory runs out, the batch is halved.
    """

    def work(rows: slice) -> list[list[int]]:
        part = vectors[rows].to(lm.device)
        blank = torch.zeros(len(part), max(lengths[rows]), dtype=torch.long, device=lm.device)
        states = lm.states(part, blank, start)
        # A passage at a time: logits of all (B, T, V) may not fit.
        return [
            lm.head(row[:n]).argmax(-1).tolist()
            for row, n in zip(states, lengths[rows], strict=True)
        ]

    return in_batches(work, len(lengths), batch)


def _reach(lm: FrozenLM) -> int | None:
    """Tokens that e can reach where every layer sees a sliding window; None: all of them.

    Past the last position that e reaches, every window holds copies of m only, and every answer is
    the same.
    """
    config: Any = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    if any("sliding" not in str(kind) for kind in kinds):
        return None
    return int(config.num_hidden_layers) * (int(window) - 1) + 1
