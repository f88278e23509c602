"""The inputs around the vectors: the front is in front of them, and the trigger is after them.

Models read every text after their BOS, and it is their attention sink (Xiao et al. 2023, arXiv
2309.17453). The first vector of a sequence must serve as attention sink, too, unless BOS is in
front of it. All contexts that vectors are compared with begin with BOS.

Under the start rule 'bos', the trigger is between the vectors and the passage. It is BOS, another
token, or R trained soft tokens. A crammed trigger may also have P soft tokens in front of the
vectors, after BOS. Soft tokens are the same for all passages.

The size of the vectors may distinguish the two modes, too: context mode multiplies them by
`context_scale`, decoding mode uses them as stored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.errors import MemvecError
from memvec.model.soft_tokens import first_soft_id

if TYPE_CHECKING:
    from memvec.cramming.fields import FrontName
    from memvec.model.lm import FrozenLM

MADE_BY = "memvec trigger train"


@dataclass(frozen=True)
class CrammedTrigger:
    """The soft tokens of a trigger, float32: R after the vectors, and P or none in front of them.

    `identity` is the hash of the file from which it was loaded, '' without a file.
    """

    rows: Float[Tensor, "R D"]
    identity: str = ""
    front: Float[Tensor, "P D"] | None = None

    @property
    def table(self) -> Float[Tensor, "N D"]:
        """All soft tokens, those after the vectors first (N = R + P)."""
        return self.rows if self.front is None else torch.cat([self.rows, self.front])


def with_front(lm: FrozenLM, front: FrontName) -> FrozenLM:
    """A view with nothing or BOS in front of the vectors; 'auto' is BOS if that is possible.

    It is possible if the model has a BOS, and the vectors are inputs in front of a passage. Soft
    tokens in front of the vectors are kept. Raises MemvecError for 'bos' if it is not possible.
    """
    fits = _takes_front(lm)
    if front == "bos" and lm.bos_id is None:
        raise MemvecError(f"{lm.name} has no BOS token to put in front of vectors: use front=none.")
    if front == "bos" and not fits:
        raise MemvecError(
            f"BOS can stand in front of inputs that a passage follows, which vectors in the space "
            f"'{lm.reading.space}' with the layout '{lm.reading.layout}' are not: use front=none."
        )
    tokens = (lm.bos_id,) if front != "none" and fits and lm.bos_id is not None else ()
    if tokens == _tokens(lm):
        return lm
    view = copy.copy(lm)
    view.front = (*tokens, *lm.front[len(_tokens(lm)) :])
    return view


@torch.no_grad()
def front_rows(lm: FrozenLM) -> Float[Tensor, "F D"]:
    """The inputs in front of the vectors, in the model's dtype; (0, D) if there are none."""
    return lm.after_front(torch.empty(1, 0, lm.width, device=lm.device))[0]


def in_full(lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "N D"]:
    """The front, the vectors and the soft tokens after them, float32 on the CPU.

    `lm` is the view that reads the vectors. Other software has no soft tokens, so it gets all rows
    as vectors.
    """
    after = recorded(lm)[1].get("trigger", vectors[:0])
    return torch.cat([part.float().cpu() for part in (front_rows(lm), vectors, after)])


def with_trigger(lm: FrozenLM, trigger: int | CrammedTrigger | None) -> FrozenLM:
    """A view with another trigger: a token id, soft tokens, or BOS (None).

    Soft tokens in front of the vectors are left out unless vectors are inputs in front of a
    passage. Raises MemvecError for a token that the model does not have, or rows of another width.
    """
    if trigger is None and lm.other_trigger is None:
        return lm
    if isinstance(trigger, CrammedTrigger):
        table = trigger.table if _takes_front(lm) else trigger.rows
        return with_soft_tokens(lm, table, len(trigger.rows))
    if trigger is not None and not 0 <= trigger < lm.vocab_size:
        raise MemvecError(
            f"{lm.name} has no token {trigger} to use as a trigger: its vocabulary has "
            f"{lm.vocab_size}."
        )
    view = copy.copy(lm)
    view.soft, view.front = None, _tokens(lm)
    view.other_trigger = None if trigger is None else (trigger,)
    return view


def with_soft_tokens(lm: FrozenLM, table: Float[Tensor, "N D"], after: int) -> FrozenLM:
    """A view whose trigger is the first `after` rows; the other rows are in front of the vectors.

    Gradients flow to the table. Raises MemvecError for rows of another width.
    """
    if table.shape[1] != lm.width:
        raise MemvecError(
            f"this trigger has vectors of {table.shape[1]} numbers and {lm.name} takes "
            f"{lm.width}: train one for this model with {MADE_BY}."
        )
    first = first_soft_id(lm)
    ids = range(first, first + len(table))
    view = copy.copy(lm)
    view.soft = table.to(lm.device)
    view.other_trigger, view.front = tuple(ids[:after]), (*_tokens(lm), *ids[after:])
    return view


def as_context_at(lm: FrozenLM, scale: float) -> FrozenLM:
    """A view that multiplies vectors by `scale` in context mode.

    Raises MemvecError for another scale than the present one if vectors are not inputs in front of
    a passage.
    """
    if lm.context_scale == scale:
        return lm
    if not _takes_front(lm):
        raise MemvecError(
            f"context_scale is of inputs in front of a passage, which vectors in the space "
            f"'{lm.reading.space}' with the layout '{lm.reading.layout}' are not: leave it out."
        )
    view = copy.copy(lm)
    view.context_scale = scale
    return view


def surrounded(
    lm: FrozenLM, front: FrontName, token: int | None, soft: Mapping[str, Tensor]
) -> FrozenLM:
    """A view with the front, the trigger's token and the soft tokens (by name) of a file.

    Raises MemvecError as `with_front` and `with_trigger` do.
    """
    lm = with_front(lm, front)
    if not soft:
        return with_trigger(lm, token)
    return with_trigger(lm, CrammedTrigger(soft["trigger"], front=soft.get("front")))


def recorded(lm: FrozenLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inputs around the vectors: as fields of a file's header, and the soft tokens by name."""
    other, after = lm.other_trigger, len(lm.trigger)
    soft = {} if lm.soft is None else {"trigger": lm.soft[:after], "front": lm.soft[after:]}
    soft = {name: rows for name, rows in soft.items() if len(rows)}
    counts = {f"soft_{name}": len(soft.get(name, ())) for name in ("trigger", "front")}
    token = other[0] if other is not None and not soft else None
    front = "bos" if _tokens(lm) else "none"
    facts = {"front": front, "trigger": token, "context_scale": lm.context_scale}
    return facts | counts, soft


def _takes_front(lm: FrozenLM) -> bool:
    """True if inputs can be in front of the vectors: these are inputs in front of a passage."""
    return lm.reading.layout == "prefix" and lm.reading.space == "inputs"


def _tokens(lm: FrozenLM) -> tuple[int, ...]:
    """The tokens in front of the vectors, without soft tokens."""
    return tuple(token for token in lm.front if token < first_soft_id(lm))
