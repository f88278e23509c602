"""A vector against n real preceding tokens (paper, Table 2 and `ablations_context_length.ipynb`).

How many bits does ordinary context take off the same passage? Only sources with text before their
passages can say; where fewer than n tokens stood before, the entry is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from memvec.lab.protocols.protocol import Protocol, bits_after

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.model.reading import StartRule
    from memvec.passages.found import Found


class Context(Protocol):
    """Real context instead of a vector."""

    name = "context"
    options = {"contexts": (64, 128, 512, 1024)}  # noqa: RUF012
    extras = {  # noqa: RUF012
        "context": "for each n: [bits of the passage, arg-max hits] after n real tokens, no vectors"
    }

    def extra(
        self,
        lm: FrozenLM,
        found: Found,
        vectors: Tensor,
        start: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        given = int(start == "first-token")
        ids = found.passage.ids
        table = {}
        for n in options["contexts"]:
            fits = lm.context is None or n + len(ids) + 1 <= lm.context
            if fits and n <= len(found.before):
                table[str(n)] = list(bits_after(lm, found.before[-n:] if n else (), ids, given))
        return {"context": table}
