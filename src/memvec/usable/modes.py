"""Three numbers for the two modes of vectors: decoding (after the trigger) and context (without).

An object is made once for a passage and its held-out texts, and called for each change of the
vectors, or of the model while it reads them.
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
    """How much of a passage vectors give back, and their divergence from it as context."""

    @torch.no_grad()
    def __init__(self, lm: FrozenLM, ids: Sequence[int], words: Int[Tensor, "M L"]) -> None:
        self.lm, self.words = lm, words.to(lm.device)
        self.ids = torch.tensor([list(ids)], device=lm.device)
        # The reference is read here, outside of whatever a caller changes in the model.
        self.reference = log_p_after(lm, text_inputs(lm, ids), self.words)

    @torch.no_grad()
    def __call__(self, vectors: Float[Tensor, "K D"]) -> list[float]:
        """[leading right tokens after the trigger, mean margin (logits), KL (nats per token)].

        Leading tokens are teacher-forced: as many as free-running decoding gives back.
        """
        rows = vectors[None].to(self.lm.device)
        logits = self.lm.logits(rows, self.ids, "bos")
        margin = metrics.margins(logits, self.ids)
        leading = metrics.horizon(margin > 0)
        context = self.lm.after_front(self.lm.context_scale * rows)
        log_q = log_p_after(self.lm, context, self.words)
        kl = (self.reference.exp() * (self.reference - log_q)).sum(-1).mean()
        return [float(leading[0]), float(margin.mean()), float(kl)]
