"""Mixed precision: float32 weights and vectors, products under autocast.

Kuratov et al. ran their Llama, OLMo and Sheared-LLaMA models so (train.py): nothing is stored in
fewer bits than float32, and matrix products are in bfloat16. Weights that are rounded once give
other logits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

BFLOAT16_AUTOCAST = "bfloat16-autocast"  # as the choice of a dtype, and in records
_MARK = "_memvec_autocast"


def put_under_autocast(model: nn.Module) -> None:
    """Compute a model that was just loaded under bfloat16 autocast from now on.

    Its body and its output head too, since they are also called by themselves.
    """
    parts = [model, getattr(model, str(getattr(model, "base_model_prefix", "")), None)]
    parts.append(model.get_output_embeddings())  # type: ignore[operator]
    for part in {id(part): part for part in parts if isinstance(part, nn.Module)}.values():
        part.forward = _mixed(part.forward)  # type: ignore[method-assign]
    setattr(model, _MARK, torch.bfloat16)


def autocast_of(model: nn.Module) -> torch.dtype | None:
    """The dtype that a model's products are autocast to; None for a model that is not mixed."""
    dtype: torch.dtype | None = getattr(model, _MARK, None)
    return dtype


def _mixed(forward: Any) -> Any:
    """A forward under autocast, whatever device its inputs are on."""

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values())
        device = next(t.device.type for t in inputs if isinstance(t, torch.Tensor))
        with torch.autocast(device, dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    return mixed
