"""Models whose weights hardly fit: quantized, or spread over several devices (`memvec[big]`).

transformers loads them (`device_map`, quantization configurations); this file says how, and refuses
what it would do in silence. Fewer kept activations: memvec.model.large.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import nn

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


def refuse_spilled(model: nn.Module, name: str) -> None:
    """Raise MemvecError if a `device_map` left weights in main memory or on disk beside a GPU.

    While gradients are computed, the copies of such weights on the GPU are kept until the backward
    pass, so nothing is saved; each forward pass copies all of them.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise MemvecError(
            f"{name} does not fit on the GPUs: device_map leaves a part of its weights in main "
            "memory or on disk, where cramming saves nothing by it. Use quantize, more GPUs, or "
            "device='cpu' (on the command line: --load quantize=4bit, --device cpu)."
        )
