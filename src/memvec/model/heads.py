"""Splits a model into body and head, so that logits are computed only where they are needed.

Some families apply a scale (Cohere, Granite) or a soft cap (Gemma 2) after the linear head. Each
candidate for the head is compared with the model's own forward pass on a probe, and is used only if
the logits agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.errors import MemvecError
from memvec.model import memory

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

Head = Callable[[Tensor], Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and PEFT, which hide body, head and cache.

    Steps differ in shape, and a compiled model would be compiled for each. PEFT's adapters are in
    the module inside; its virtual tokens are not, so a model with these stays as it is. Raises
    MemvecError for another object than a module of PyTorch.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise MemvecError(f"a model of transformers is needed, not a {type(model).__name__}.")
    tuned: Any = getattr(model, "peft_config", {})
    inside: Any = getattr(model, "get_base_model", None)
    if inside is None or any(config.is_prompt_learning for config in tuned.values()):
        return model
    return unwrapped(inside())


@torch.no_grad()
def split_head(model: nn.Module, embedding: nn.Module) -> tuple[nn.Module | None, Head]:
    """Body and head of a model, whose composition equals the model's own forward pass.

    The body takes inputs (B, N, D) and returns hidden states (B, N, H) as its first output; the
    head turns states into logits (B, N, V). Returns (None, identity) if no such pair agrees.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(body, nn.Module) or body is model or linear is None:
        return None, lambda states: states
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    heads: list[Head] = [linear]
    if isinstance(scale, int | float):
        heads.append(lambda states: linear(states) * scale)
    if isinstance(divisor, int | float):
        heads.append(lambda states: linear(states) / divisor)
    if isinstance(cap, int | float):
        heads.append(lambda states: torch.tanh(linear(states) / cap) * cap)
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    inputs = embedding(torch.arange(1, 6, device=weight.device)[None] % len(weight))
    try:
        states = body(inputs_embeds=inputs, use_cache=False)[0]
        truth = model(inputs_embeds=inputs, use_cache=False).logits.float()
        for head in reversed(heads):  # the cap first: without it, small logits agree just as well
            if torch.allclose(head(states).float().to(truth), truth, rtol=1e-3, atol=1e-3):
                return body, head
    except Exception:  # the body needs other arguments: use the whole model, which is checked
        pass
    return None, lambda states: states


def at_states(
    lm: FrozenLM,
    states: Float[Tensor, "B T H"],
    ids: Int[Tensor, "B T"],
    *functions: Callable[[Tensor, Tensor], Tensor],
) -> list[Float[Tensor, "B T"]]:
    """Functions of the logits at hidden states and of the true tokens, on the CPU.

    A few rows of logits are computed at a time: those of a long text would not fit in memory.
    """
    B, T, H = states.shape
    flat, truth = states.reshape(1, B * T, H), ids.reshape(1, -1)
    rows = max(1, memory.LOGITS_AT_ONCE // lm.vocab_size)
    parts: list[list[Tensor]] = [[] for _ in functions]
    for at in range(0, B * T, rows):
        logits = lm.head(flat[:, at : at + rows])
        for part, function in zip(parts, functions, strict=True):
            part.append(function(logits, truth[:, at : at + rows])[0].cpu())
    return [torch.cat(part).reshape(B, T) for part in parts]
