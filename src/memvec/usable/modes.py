"""Three figures for the two modes of vectors: decoding mode and context mode.

Make one object for a passage and its held-out queries, and call it for each change of the vectors,
or of the model that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import metrics
from memvec.model.lm import FrozenLM
from memvec.usable.queries import text_inputs
from memvec.usable.teacher import log_p_after


class BothModes:
    """Measures decoding mode (tokens, margin) and context mode (KL) of a passage's vectors."""

    @torch.no_grad()
    def __init__(self, lm: FrozenLM, ids: Sequence[int], queries: Int[Tensor, "M L"]) -> None:
        self.lm, self.queries = lm, queries.to(lm.device)
        self.ids = torch.tensor([list(ids)], device=lm.device)
        # A caller may later change the model (memvec.usable.knockout); the reference is unchanged.
        self.reference = log_p_after(lm, text_inputs(lm, ids), self.queries)

    @torch.no_grad()
    def __call__(self, vectors: Float[Tensor, "K D"]) -> list[float]:
        """[leading right tokens after the trigger, mean margin (logits), KL (nats per token)].

        The leading right tokens of a teacher-forced pass are those that free decoding gives back.
        """
        rows = vectors[None].to(self.lm.device)
        logits = self.lm.logits(rows, self.ids, "bos")
        margin = metrics.margins(logits, self.ids)
        leading = metrics.horizon(margin > 0)
        context = self.lm.after_front(self.lm.context_scale * rows)
        log_q = log_p_after(self.lm, context, self.queries)
        kl = (self.reference.exp() * (self.reference - log_q)).sum(-1).mean()
        return [float(leading[0]), float(margin.mean()), float(kl)]
