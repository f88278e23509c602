"""Save memory of activations at the cost of time: gradient checkpointing and offloading.

transformers' own gradient checkpointing works in training mode only, which would enable dropout. So
this file wraps the layers of a model in eval mode. Offloading keeps activations in main memory.
Both give the same numbers as the plain path up to the order of sums, because an offloaded view
comes back as a contiguous tensor. (memvec.big loads models whose weights need too much memory.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memvec.errors import MemvecError


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
    # accelerate sets `forward` on some layer objects; these must be restored afterwards.
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
    """A predicate: is a tensor a weight, or a view of one? Autograd need not keep these."""
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
        offloaded_copy = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        # The CPU never reads the copy, and the copy back is ordered after this one on the device.
        return tensor.device, offloaded_copy.copy_(tensor, non_blocking=pin)

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
        # An attached output and its autograd node would refer to each other and never be freed.
        tensor = tensor.detach()
        if not is_weight(tensor):
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for t in storages.values())
