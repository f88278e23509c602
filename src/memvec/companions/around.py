"""What stands around the vectors: in front of them nothing or BOS, after them a trigger.

Models read every text after their BOS, and their attention falls on it where it has no other
target (Xiao et al. 2023, arXiv 2309.17453). Vectors that come first have to be that attention sink,
too; after BOS they need not be. All contexts that they are compared with begin with BOS.

The trigger is what follows the vectors under the start rule 'bos': BOS, another token, or R soft
tokens that were trained for it, and with them P in front of the vectors, after BOS. Soft tokens
are the same for all passages.

The size of the vectors may separate the two modes, too: in context mode they are multiplied by
`context_scale`, in decoding mode they are used as they are stored.
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
    """Soft tokens, float32: R after the vectors, and P in front of them or none.

    `identity` is the hash of the file they came from, '' without one.
    """

    rows: Float[Tensor, "R D"]
    identity: str = ""
    front: Float[Tensor, "P D"] | None = None

    @property
    def table(self) -> Float[Tensor, "N D"]:
        """All of them, those after the vectors first (N = R + P)."""
        return self.rows if self.front is None else torch.cat([self.rows, self.front])


def with_front(lm: FrozenLM, front: FrontName) -> FrozenLM:
    """The model with nothing or BOS in front of the vectors; 'auto': BOS, where that can be.

    BOS can stand only in front of inputs that a passage follows, in a model that has a BOS. Soft
    tokens in front of the vectors stay. Raises MemvecError for 'bos' where BOS cannot stand.
    """
    fits = _takes_front(lm)
    if front == "bos" and lm.bos_id is None:
        raise MemvecError(f"{lm.name} has no BOS token to put in front of vectors: use front=none.")
    if front == "bos" and not fits:
        raise MemvecError(
            f"BOS can stand in front of inputs that a passage follows, which vectors in the space "
            f"'{lm.reading.space}' with the layout '{lm.layout}' are not: use front=none."
        )
    tokens = (lm.bos_id,) if front != "none" and fits and lm.bos_id is not None else ()
    if tokens == _tokens(lm):
        return lm
    view = copy.copy(lm)
    view.front = (*tokens, *lm.front[len(_tokens(lm)) :])
    return view


@torch.no_grad()
def front_rows(lm: FrozenLM) -> Float[Tensor, "F D"]:
    """The inputs that stand in front of the vectors, in the model's dtype; none: (0, D)."""
    return lm.after_front(torch.empty(1, 0, lm.width, device=lm.device))[0]


def in_full(lm: FrozenLM, vectors: Float[Tensor, "K D"]) -> Float[Tensor, "N D"]:
    """Vectors with the front before them and the soft tokens after them, float32 on the CPU.

    `lm` is the view that reads them. Other software knows no soft tokens: to it all are vectors.
    """
    after = recorded(lm)[1].get("trigger", vectors[:0])
    return torch.cat([part.float().cpu() for part in (front_rows(lm), vectors, after)])


def with_trigger(lm: FrozenLM, trigger: int | CrammedTrigger | None) -> FrozenLM:
    """The model with another token, or soft tokens, between the vectors and the passage; None: BOS.

    Soft tokens in front of the vectors are left out where nothing can stand there. Raises
    MemvecError for a token that the model does not have, or rows of another width.
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
    """The model with the first `after` rows as its trigger, the others in front of the vectors.

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
    """The model that multiplies vectors by `scale` where it reads them as context.

    Raises MemvecError where vectors are no inputs: elsewhere their size is no scale.
    """
    if lm.context_scale == scale:
        return lm
    if not _takes_front(lm):
        raise MemvecError(
            f"context_scale is of inputs in front of a passage, which vectors in the space "
            f"'{lm.reading.space}' with the layout '{lm.layout}' are not: leave it out."
        )
    view = copy.copy(lm)
    view.context_scale = scale
    return view


def surrounded(
    lm: FrozenLM, front: FrontName, token: int | None, soft: Mapping[str, Tensor]
) -> FrozenLM:
    """The model with what a file says of the front, the trigger and soft tokens by name.

    Raises MemvecError as `with_front` and `with_trigger`.
    """
    lm = with_front(lm, front)
    if not soft:
        return with_trigger(lm, token)
    return with_trigger(lm, CrammedTrigger(soft["trigger"], front=soft.get("front")))


def recorded(lm: FrozenLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is around vectors as fields of a file's header, and the soft tokens by name."""
    other, after = lm.other_trigger, len(lm.trigger)
    soft = {} if lm.soft is None else {"trigger": lm.soft[:after], "front": lm.soft[after:]}
    soft = {name: rows for name, rows in soft.items() if len(rows)}
    counts = {f"soft_{name}": len(soft.get(name, ())) for name in ("trigger", "front")}
    token = other[0] if other is not None and not soft else None
    front = "bos" if _tokens(lm) else "none"
    facts = {"front": front, "trigger": token, "context_scale": lm.context_scale}
    return facts | counts, soft


def _takes_front(lm: FrozenLM) -> bool:
    """True if something can stand in front of the vectors: they are inputs before a passage."""
    return lm.layout == "prefix" and lm.reading.space == "inputs"


def _tokens(lm: FrozenLM) -> tuple[int, ...]:
    """What stands in front of the vectors, without soft tokens."""
    return tuple(token for token in lm.front if token < first_soft_id(lm))
