"""A vector against the text itself, repeated in context (`ablations_repeat_text.ipynb`).

"text: X, repeat previous text: X": what remains of X when X has just been read. The paper's point:
a vector is about as good as having the text in front of one's eyes.
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

BEFORE, BETWEEN = "text: ", "\nrepeat previous text: "


class Copy(Protocol):
    """The text in context instead of a vector."""

    name = "copy"
    extras = {  # noqa: RUF012
        "copy": "[bits of the passage, arg-max hits] after the same passage in context, no vectors"
    }

    def extra(
        self,
        lm: FrozenLM,
        found: Found,
        vectors: Tensor,
        start: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        ids = found.passage.ids
        words = ([], []) if lm.tokenizer is None else (lm.tokenize(BEFORE), lm.tokenize(BETWEEN))
        prefix = [*words[0], *ids, *words[1]]
        if lm.context is not None and len(prefix) + len(ids) + 1 > lm.context:
            return {"copy": None}
        return {"copy": list(bits_after(lm, prefix, ids, int(start == "first-token")))}
