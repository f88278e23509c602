"""What a protocol is: how passages are crammed for it, what else is measured, how it sums up.

A protocol is one file: a subclass with a name, a recipe to start from, sometimes an extra
measurement with the frozen model, and pure functions of finished rows. Cramming, decoding and the
common metrics are the engine's and the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.model.reading import Layout, StartRule
    from memvec.passages.found import Found


class Protocol:
    """Common skeleton; the defaults suit a protocol that only needs crammed passages."""

    name: ClassVar[str]
    preset: ClassVar[str] = "paper"  # the recipe a run starts from
    changes: ClassVar[Mapping[str, Any]] = {}  # what the protocol changes in it
    options: ClassVar[Mapping[str, Any]] = {}  # its own options and their defaults
    layout: ClassVar[Layout] = "prefix"  # how the model reads the vectors (memvec.onestep)
    extras: ClassVar[Mapping[str, str]] = {}  # what `extra` adds to a row, with a sentence each

    def tokens(self, length: int, K: int, start: StartRule) -> int:
        """Tokens of a passage for a length of the spec."""
        return length

    def extra(
        self,
        lm: FrozenLM,
        found: Found,
        vectors: Tensor,
        start: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What this protocol measures beyond the common metrics; vectors (K, D) as stored."""
        return {}


def bits_after(
    lm: FrozenLM, prefix: Sequence[int], ids: Sequence[int], given: int
) -> tuple[float, int]:
    """(bits, arg-max hits) of ids[given:] when real tokens `prefix` stand before ids, no vectors.

    Through the model's own forward. A model with a start token gets it in front.
    """
    import torch

    from memvec import metrics

    head = [lm.bos_id] if lm.bos_id is not None else []
    whole = [*head, *prefix, *ids]
    n = len(ids) - given
    if len(whole) == len(ids) and given == 0:  # nothing stands before the first token
        raise ValueError("the first token needs something before it")
    with torch.no_grad():
        table = torch.tensor([whole], device=lm.device)
        logits = lm.own_logits(table)[:, -n - 1 : -1]
        truth = table[:, -n:]
        bits = float(metrics.surprisal(logits, truth).double().sum())
        right = int((metrics.margins(logits, truth) > 0).sum())
    return bits, right
