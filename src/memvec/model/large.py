"""Models that hardly fit into memory: quantized or distributed weights, fewer kept activations.

transformers loads the weights (`device_map`, quantization configurations). This file adds two ways
to save memory at the cost of time while cramming: gradient checkpointing and offloading of
activations to main memory. transformers' own switch for gradient checkpointing needs training mode,
which would enable dropout, so the layers of a model in eval mode are wrapped here instead. Both
give the same numbers as the plain path, up to the order of sums: an offloaded view of a larger
tensor comes back contiguous.
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
GROUP = 32  # number of neighbouring weights of a row that share a scale in 4 bits


def loading_options(
    device_map: str | dict[str, Any] | None,
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for `device_map` and `quantize`.

    Quantized weights are created on `device`, unless a `device_map` distributes them. Raises
    MemvecError for an unknown `quantize` and for a missing package.
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
    """The configuration that quantizes the weights of linear layers; products are in `dtype`.

    Activations are never quantized, because a passage must not depend on the others in its batch.
    torchao is used if it is installed, else bitsandbytes.
    """
    import transformers

    if importlib.util.find_spec("torchao") is None:
        for package in ("bitsandbytes", "accelerate"):
            if importlib.util.find_spec(package) is None:
                _need("torchao", f"quantize='{quantize}'")
        if quantize == "8bit":
            # With a threshold above 0, columns in which any token of the batch is an outlier are
            # computed apart, so that a token would change the predictions of earlier tokens.
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
    """The layers that transformers marks as suitable for gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Context manager: each layer keeps only its input and is recomputed in the backward pass.

    Raises MemvecError for a model without layers that transformers marks for checkpointing.
    """
    layers = layers_of(model)
    if not layers:
        raise MemvecError(
            f"the layers of a {type(model).__name__} are not marked for checkpointing: use "
            "offload=True, or fewer slots."
        )
    # accelerate gives some layers a `forward` of their own, which must be there again afterwards.
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
    # A frozen model in eval mode uses no random numbers, so no random state has to be kept.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _weights(model: nn.Module) -> Callable[[Tensor], bool]:
    """A function that tells whether a tensor is a weight or a view of one, which need no saving."""
    # Quantized weights have no storage to compare; their type identifies them.
    places = {p.untyped_storage().data_ptr() for p in model.parameters() if _plain(p)}
    return lambda t: not _plain(t) or t.untyped_storage().data_ptr() in places


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


@contextlib.contextmanager
def offloaded(model: nn.Module, *, pin: bool) -> Iterator[None]:
    """Context manager: tensors that autograd keeps are held in main memory, except weights.

    `pin` uses page-locked memory, which makes copies from and to a GPU faster. torch's own
    `save_on_cpu` would also copy the weights of every linear layer, whose transpose autograd keeps.
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
    """Context manager that counts what autograd keeps, without weights.

    The function that it yields returns the bytes of all distinct storages so far.
    """
    storages: dict[int, Tensor] = {}
    is_weight = _weights(model)

    def keep(tensor: Tensor) -> Tensor:
        if not is_weight(tensor):
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in storages.values())
