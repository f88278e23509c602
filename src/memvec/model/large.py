"""Models that hardly fit: weights spread over devices or kept in few bits, activations kept small.

Loading is transformers' own work (`device_map`, quantization configurations); what stands here are
the two ways to pay time for memory during cramming, on a frozen model in eval mode. transformers'
switch for gradient checkpointing is tied to training mode, where dropout is alive, so layers are
wrapped here instead. Both give the numbers that the plain path gives (what is set aside and was a
part of a larger tensor comes back in one piece, which may change the order of a sum).
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
GROUP = 32  # neighbouring weights of a row that share a scale, in 4 bits


def loading_options(
    device_map: str | dict[str, Any] | None,
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`. Raises MemvecError where a package for it is missing.

    Weights in few bits are made where they stay: on `device`, unless a `device_map` spreads them.
    """
    options: dict[str, Any] = {}
    if quantize is not None:
        if quantize not in get_args(Quantize):
            hint = did_you_mean(quantize, get_args(Quantize))
            raise MemvecError(f"unknown quantize '{quantize}': {hint}")
        options["quantization_config"] = _quantization(quantize, dtype)
        if device_map is None and device.type != "cpu":
            _need("accelerate", f"quantize='{quantize}' on a GPU")
            options["device_map"] = {"": device}
    if device_map is not None:
        _need("accelerate", "device_map")
        options["device_map"] = device_map
    return options


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    """Weights of linear layers in few bits; computation in `dtype`.

    Only the weights are rounded, never what flows between layers: a passage must not depend on what
    else is in its batch. torchao does that everywhere; bitsandbytes where it alone is installed.
    """
    import transformers

    if importlib.util.find_spec("torchao") is None:
        for package in ("bitsandbytes", "accelerate"):
            if importlib.util.find_spec(package) is None:
                _need("torchao", f"quantize='{quantize}'")
        if quantize == "8bit":
            # Threshold 0: otherwise columns in which any token of the batch is an outlier are
            # computed apart, and a token changes what the tokens before it predict.
            return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if quantize == "8bit":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    groups = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    return transformers.TorchAoConfig(groups)


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
            "offload=True, or fewer slots."
        )
    # A layer that accelerate moves data to has a forward of its own already, and keeps it.
    own_forwards = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(_computed_again, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own_forwards, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _computed_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Frozen and in eval mode: nothing is random, so there is no random state to keep.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _weights(model: nn.Module) -> Callable[[Tensor], bool]:
    """Whether a tensor that autograd keeps is a weight, or a view of one: those stay anyway."""
    # Weights in few bits have no storage of their own to compare, and are recognised by their type.
    places = {p.untyped_storage().data_ptr() for p in model.parameters() if _plain(p)}
    return lambda t: not _plain(t) or t.untyped_storage().data_ptr() in places


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


@contextlib.contextmanager
def offloaded(model: nn.Module, *, pin: bool) -> Iterator[None]:
    """Within, what autograd keeps waits in the computer's memory; weights stay where they are.

    `pin` page-locks it, for faster copies from and to a GPU. torch's own `save_on_cpu` would copy
    every linear layer's weights as well, whose transpose autograd keeps.
    """
    is_weight = _weights(model)

    def keep(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if is_weight(tensor):
            return None, tensor
        aside = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        return tensor.device, aside.copy_(tensor)

    def give(stored: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = stored
        return tensor if device is None else tensor.to(device, non_blocking=pin)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts what autograd keeps within, without weights: bytes of distinct storages, by call."""
    storages: dict[int, Tensor] = {}
    is_weight = _weights(model)

    def keep(tensor: Tensor) -> Tensor:
        if not is_weight(tensor):
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in storages.values())
