"""Models with large weights: quantized, or distributed over several devices (`memvec[big]`).

transformers loads them. This file makes the options for it (`device_map`, quantization), and
refuses weights that it silently puts into main memory or on disk. (memvec.model.large saves memory
of activations.)
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

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
        raise MemvecError(
            f"{option} needs the package {package}: pip install '.[big]' in the repository."
        )


def prepare(model: nn.Module, name: str) -> None:
    """Prepare a model that was loaded with `loading_options` for cramming, in place.

    Raises MemvecError as `refuse_spilled` does.
    """
    refuse_spilled(model, name)
    keep_few_bits(model)


def keep_few_bits(model: nn.Module) -> None:
    """Make autograd keep the quantized weights of linear layers instead of dequantized copies.

    torchao dequantizes a weight for each product, and autograd keeps the result for the backward
    pass: over all layers, these copies are as large as the unquantized model. Here the backward
    pass dequantizes again. bitsandbytes does so itself.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "__tensor_flatten__"):
            row = (weight.dtype, weight.device, weight.dim(), weight.shape[1])
            kept = _kept_of(module.forward, *row)
            wide = {i for i, tensor in enumerate(kept) if tensor.numel() == weight.numel()}
            module.forward = functools.partial(  # type: ignore[method-assign]
                _product, module.forward, wide
            )


def _product(forward: Callable[[Tensor], Tensor], wide: set[int], x: Tensor) -> Tensor:
    """A product; of the tensors that autograd keeps, those numbered in `wide` are recomputed."""
    if not torch.is_grad_enabled():
        return forward(x)
    count, row = itertools.count(), (x.dtype, x.device, x.dim(), x.shape[-1])

    def keep(tensor: Tensor) -> int | Tensor:
        number = next(count)
        return number if number in wide else tensor

    def give(kept: int | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else _kept_of(forward, *row)[kept]

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return forward(x)


def _kept_of(
    forward: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device, dim: int, D: int
) -> list[Tensor]:
    """The tensors that autograd keeps of a product with a single row."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    row = torch.zeros((1,) * (dim - 1) + (D,), dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward(row)
    return kept


def refuse_spilled(model: nn.Module, name: str) -> None:
    """Raise MemvecError if a `device_map` left weights in main memory or on disk beside a GPU.

    While gradients are computed, the copies of such weights on the GPU are kept until the backward
    pass, so nothing is saved; each forward pass copies all of them.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise MemvecError(
            f"{name} does not fit on the GPUs: device_map leaves a part of its weights in main "
            "memory or on disk, where cramming saves nothing by it. Use quantize='4bit', more "
            "GPUs, or the device 'cpu'."
        )
