"""What follows the vectors under the start rule 'bos': BOS, another token, or crammed soft tokens.

A crammed trigger is R input vectors that all passages share: they say 'now give the passage back',
and are trained once for a model (memvec.usable.triggers). A model reads them as tokens of its own,
*soft tokens*, whose ids come behind the rows of its embedding; only a view of the model
(`with_trigger`) has them, and no text is ever tokenized to them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

MADE_BY = "memvec trigger train"


def with_trigger(lm: FrozenLM, trigger: int | Float[Tensor, "R D"] | None) -> FrozenLM:
    """The model with another token, or soft tokens, between the vectors and the passage; None: BOS.

    Raises MemvecError for a token that the model does not have, or rows of another width.
    """
    if trigger is None and lm.other_trigger is None:
        return lm
    view = copy.copy(lm)
    view.soft = None
    if isinstance(trigger, Tensor):
        if trigger.shape[1] != lm.width:
            raise MemvecError(
                f"this trigger has vectors of {trigger.shape[1]} numbers and {lm.name} takes "
                f"{lm.width}: train one for this model with {MADE_BY}."
            )
        rows = len(lm.embedding.weight)  # type: ignore[arg-type]
        view.soft = trigger.to(lm.device)
        view.other_trigger = tuple(range(rows, rows + len(trigger)))
    elif trigger is not None and not 0 <= trigger < lm.vocab_size:
        raise MemvecError(
            f"{lm.name} has no token {trigger} to use as a trigger: its vocabulary has "
            f"{lm.vocab_size}."
        )
    else:
        view.other_trigger = None if trigger is None else (trigger,)
    return view


def embedded(lm: FrozenLM, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
    """Embeddings of token ids, soft tokens among them; gradients flow to the soft tokens."""
    assert lm.soft is not None
    rows = len(lm.embedding.weight)  # type: ignore[arg-type]
    soft = ids >= rows
    plain: Tensor = lm.embedding(ids.masked_fill(soft, 0))
    own = lm.soft.to(plain.dtype)[(ids - rows).clamp_min(0)]
    return torch.where(soft[..., None], own, plain)
