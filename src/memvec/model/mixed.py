"""Mixed precision: float32 weights and vectors, matrix products in bfloat16 under autocast.

Kuratov et al. ran their Llama, OLMo and Sheared-LLaMA models this way (train.py). Weights that are
stored in bfloat16 give other logits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

BFLOAT16_AUTOCAST = "bfloat16-autocast"  # its name as a dtype, for users and in records
_MARK = "_memvec_autocast"


def put_under_autocast(model: nn.Module) -> None:
    """Make a model compute under bfloat16 autocast from now on.

    Its body and its output head are wrapped too, since memvec also calls them separately.
    """
    parts = [model, getattr(model, str(getattr(model, "base_model_prefix", "")), None)]
    parts.append(model.get_output_embeddings())  # type: ignore[operator]
    for part in {id(part): part for part in parts if isinstance(part, nn.Module)}.values():
        part.forward = _mixed(part.forward)  # type: ignore[method-assign]
    setattr(model, _MARK, torch.bfloat16)


def autocast_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's products under autocast; None without mixed precision."""
    dtype: torch.dtype | None = getattr(model, _MARK, None)
    return dtype


def _mixed(forward: Any) -> Any:
    """Wrap a forward method in autocast for the device of its inputs."""

    @functools.wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values())
        device = next(t.device.type for t in inputs if isinstance(t, torch.Tensor))
        with torch.autocast(device, dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    return mixed
