"""A model's body and head: logits only where they are needed.

Families add a scale (Cohere, Granite) or a soft cap (Gemma 2) after the linear head. Each candidate
is compared with the model's own forward on a probe, and taken only if the logits agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


@torch.no_grad()
def split_head(model: nn.Module, embedding: nn.Module) -> tuple[nn.Module | None, Head]:
    """The body, (B, N, D) -> states, and the head, states -> logits, that together equal the
    model's own forward; (None, identity) if there are no such two."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(body, nn.Module) or body is model or linear is None:
        return None, lambda states: states
    config: Any = model.config
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
        for head in reversed(heads):  # small logits look alike with and without a cap
            if torch.allclose(head(states).float(), truth, rtol=1e-3, atol=1e-3):
                return body, head
    except Exception:  # the body asks for something else: use the whole, whose checks give reasons
        pass
    return None, lambda states: states
