"""Knock out attention to the vectors in some layers, to learn in which layers they are read.

In a knocked-out layer, positions after the vectors do not attend to the vectors: a hook masks these
positions in the layer's attention mask, so the softmax runs over the other positions. Attention at
the vectors' own positions does not change, so their states in higher layers stay the same.
Gradients and decoding with a cache are not supported.

This works for models with one attention module per layer that takes `attention_mask` and
`position_embeddings` (Llama, OLMo 2, Qwen, Mistral, Gemma, Phi and others), with the attention
implementations 'sdpa' and 'eager'.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.memory import out_of_memory

KERNELS = ("sdpa", "eager")  # attention implementations that take any mask


def attention_modules(lm: FrozenLM) -> list[nn.Module]:
    """The attention module of each layer, from the first layer to the last.

    Raises MemvecError for a model with other attention modules than those of Llama.
    """
    kernel = getattr(lm.config, "_attn_implementation", None)
    layers = int(getattr(lm.config.get_text_config(), "num_hidden_layers", 0))
    modules = [module for module in lm.model.modules() if _is_attention(module)]
    if len(modules) != layers or kernel not in KERNELS:
        raise _unfit(lm, f"{len(modules)} attention modules like Llama's in {layers} layers")
    return modules


@torch.no_grad()
def layer_count(lm: FrozenLM) -> int:
    """The number of layers in which attention can be knocked out.

    Raises MemvecError as `attention_modules` does, and for a model that reads vectors not only by
    attention (a hybrid with a recurrent state).
    """
    layers, token = len(attention_modules(lm)), lm.embed(torch.tensor([[2]], device=lm.device))
    # Two different vectors, each followed by the same token.
    inputs = lm.after_front(
        torch.stack([torch.cat([part, token[0]]) for part in (-token[0], 2 * token[0])])
    )
    try:
        with knocked_out(lm, range(layers), 1):
            first, second = lm.states_of(inputs, keep=1)
    except RuntimeError as error:  # the mask's shape does not fit: alibi, linear attention
        if out_of_memory(error):
            raise
        raise _unfit(lm, "attention that takes no mask of other positions") from error
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-3):
        raise _unfit(lm, "another way than attention to read them")
    return layers


def _unfit(lm: FrozenLM, reason: str) -> MemvecError:
    return MemvecError(
        f"{lm.name} has {reason}, so attention to its vectors cannot be knocked out layer by "
        "layer: leave out `layers`, or use a model like Llama with the kernel sdpa or eager."
    )


def _is_attention(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("Attention"):
        return False
    return {"attention_mask", "position_embeddings"} <= inspect.signature(
        module.forward
    ).parameters.keys()


@contextlib.contextmanager
def knocked_out(lm: FrozenLM, layers: Collection[int], K: int) -> Iterator[None]:
    """Context manager: in these layers, positions after K vectors do not attend to the vectors.

    They still attend to the inputs in front of the vectors. Raises MemvecError as
    `attention_modules` does.
    """
    modules, first = attention_modules(lm), len(lm.front)

    def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        states = options["hidden_states"] if "hidden_states" in options else args[0]
        mask = _without(options["attention_mask"], states, first, first + K)
        return args, {**options, "attention_mask": mask}

    with contextlib.ExitStack() as stack:
        for layer in layers:
            handle = modules[layer].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _without(
    mask: Tensor | None, states: Float[Tensor, "B N D"], first: int, end: int
) -> Float[Tensor, "b 1 N N"]:
    """A layer's additive mask in which positions [first, end) are hidden from positions >= end."""
    N, lowest = states.shape[1], torch.finfo(states.dtype).min
    position = torch.arange(N, device=states.device)
    visible = position[None] <= position[:, None]
    if mask is not None:  # e.g. of a sliding window: positions that it hides stay hidden
        visible = mask if mask.dtype == torch.bool else mask > lowest / 2
    hidden = (position[None] >= first) & (position[None] < end)
    visible = visible & ~((position[:, None] >= end) & hidden)
    added = torch.zeros(visible.shape, dtype=states.dtype, device=states.device)
    return added.masked_fill(~visible, lowest).reshape(-1, 1, N, N)
