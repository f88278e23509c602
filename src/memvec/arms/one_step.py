"""One-step decoding: one forward pass gives all tokens of a passage.

Mezentsev & Oseledets, "Exploring the Hidden Capacity of LLMs for One-Step Text Generation" (arXiv
2505.21189, EMNLP 2025). The model reads [e, m, m, ..., m], as many inputs as the passage has
tokens, and the output at position i is token i. No token is fed back, so the text cannot be
continued. In the published tables, the two vectors of larger models hold 0.5 to 0.8 times as many
tokens as one vector of autoregressive decoding (by another criterion); those of Pythia-160M and
410M hold more. With a shared m, P passages have P + 1 vectors in all.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.arms.shared_job import SharedCramJob
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import Layout, Reading, StartRule


class OneStepReading(Reading):
    """[e, m x (T - 1)] for vectors (B, 2, D): one forward pass gives all tokens of a passage."""

    layout: Layout = "one-step"
    fixed_vectors = 2
    feeds_back = enlarges = False

    def inputs(
        self,
        lm: FrozenLM,
        vectors: Float[Tensor, "B K D"] | None,
        ids: Int[Tensor, "B T"],
        start_rule: StartRule = "vectors",
    ) -> Float[Tensor, "B N D"]:
        """[e, m x (T - 1)]; without vectors, the inputs of `Reading`.

        Of `ids`, only the number of columns T matters. Raises MemvecError for another number of
        vectors than two, and for another start rule than 'vectors'.
        """
        if vectors is None:
            return super().inputs(lm, vectors, ids, start_rule)
        if vectors.shape[1] != 2:
            raise MemvecError(
                f"one-step decoding takes two vectors, e and m, not {vectors.shape[1]}."
            )
        if start_rule != "vectors":
            raise MemvecError(
                "one-step decoding continues no given tokens: use the start rule "
                f"'vectors', not '{start_rule}'."
            )
        vectors = vectors.to(lm.dtype)
        return torch.cat([vectors[:, :1], vectors[:, 1:].expand(-1, ids.shape[1] - 1, -1)], dim=1)

    def inputs_before(self, K: int, start_rule: StartRule) -> int:
        """0: each input predicts a token."""
        return 0

    def context(self, lm: FrozenLM) -> int | None:
        """The largest number of inputs; smaller if all layers have a sliding window.

        Beyond the last position that e can reach through the layers, all windows hold copies of m
        only, so all predictions are equal.
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


class OneStepSharedM(OneStepReading):
    """One-step decoding with one m for all passages of a file, which is stored once."""

    layout: Layout = "one-step-shared"
    shares_vector = True
    job_type = SharedCramJob

    def rows(self, vectors: Float[Tensor, "P K D"]) -> Float[Tensor, "R k D"]:
        """[m, e_1 ... e_P] as (P + 1, 1, D)."""
        return torch.cat([vectors[:1, 1:], vectors[:, :1]]).contiguous()

    def vectors(self, rows: Float[Tensor, "R k D"]) -> Float[Tensor, "P K D"]:
        """(e_p, m) of each passage."""
        return torch.cat([rows[1:], rows[:1].expand(len(rows) - 1, -1, -1)], dim=1).contiguous()
