"""Models that hardly fit: weights spread over devices or kept in few bits, activations kept small.

Loading is transformers' own work (`device_map`, quantization configurations); what stands here are
the two ways to pay time for memory during cramming, on a frozen model in eval mode. transformers'
switch for gradient checkpointing is tied to training mode, where dropout is alive, so layers are
wrapped here instead. Both give the very numbers that the plain path gives.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memvec.errors import MemvecError, did_you_mean

Quantize = Literal["8bit", "4bit"]


def loading_options(
    device_map: str | dict[str, Any] | None, quantize: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What `from_pretrained` is told. Raises MemvecError where a package for it is missing."""
    options: dict[str, Any] = {}
    if quantize is not None:
        if quantize not in get_args(Quantize):
            hint = did_you_mean(quantize, get_args(Quantize))
            raise MemvecError(f"unknown quantize '{quantize}': {hint}")
        options["quantization_config"] = _quantization(quantize, dtype)
    if device_map is not None:
        _need("accelerate", "device_map")
        options["device_map"] = device_map
    return options


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    """Weights of linear layers in few bits; computation in `dtype`."""
    import transformers

    if importlib.util.find_spec("bitsandbytes") is None and importlib.util.find_spec("torchao"):
        from torchao import quantization

        kinds = {
            "8bit": quantization.Int8WeightOnlyConfig,
            "4bit": quantization.Int4WeightOnlyConfig,
        }
        return transformers.TorchAoConfig(kinds[quantize]())
    for package in ("bitsandbytes", "accelerate"):
        _need(package, f"quantize='{quantize}'")
    if quantize == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _need(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MemvecError(f"{option} needs the package {package}: pip install 'memvec[big]'.")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself marks as fit for gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within, each layer keeps its input only and is computed again on the way back.

    Raises MemvecError for a model whose layers are not known.
    """
    layers = layers_of(model)
    if not layers:
        raise MemvecError(
            f"the layers of a {type(model).__name__} are not marked for checkpointing: use "
            "offload=True, or fewer seats."
        )
    try:
        for layer in layers:
            layer.forward = functools.partial(_again, layer.forward)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Frozen and in eval mode: nothing is random, so no random state is worth keeping.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextlib.contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Counts what autograd keeps within, without weights: bytes of distinct storages, by call."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in kept.values())
