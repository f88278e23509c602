"""The numbers of a space, read the slow and independent way (beside memvec.lab.slow).

Keys and values are written into a DynamicCache number by number, in the order that a file has them:
layer by layer the keys, then the values, of each a head after the other. What other layers hold,
and how many heads a layer has, is asked of the model's own forward on tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memvec.model.lm import FrozenLM


def front(lm: FrozenLM, vectors: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """What stands before the tokens for vectors (K, W): inputs (K, D), or none and a cache in the
    arguments of the model's forward."""
    space, options = lm.reading.space, lm.reading.options
    if space == "shared-basis":
        basis = lm.reading.vectors_of(torch.eye(vectors.shape[1]))  # type: ignore[attr-defined]
        return (vectors.cpu().double() @ basis.double()).float(), {"use_cache": False}
    if space in ("prefix", "prefix-layer"):
        argument = str(lm.caching.argument)
        trained = [options["layer"]] if space == "prefix-layer" else None
        filler = options.get("filler", 0)
        cache = _cache(lm, argument, vectors, options["units"], trained, filler)
        return None, {"use_cache": True, argument: cache}
    return vectors, {"use_cache": False}


@torch.no_grad()
def _cache(
    lm: FrozenLM,
    argument: str,
    vectors: Tensor,
    units: list[int],
    trained: list[int] | None,
    filler: int,
) -> Any:
    from transformers import DynamicCache

    K = len(vectors)
    held = DynamicCache()  # of K fillers: their keys and values, and the shapes of all layers
    lm.model(input_ids=torch.full((1, K), filler, device=lm.device), **{argument: held})
    cache, at, turn = DynamicCache(), 0, 0
    for layer, own in enumerate(held.layers):
        tables = [own.keys.clone(), own.values.clone()]
        if trained is None or layer in trained:
            for table in tables:
                heads, width = table.shape[1], table.shape[3]
                for head in range(heads):
                    for k in range(K):
                        numbers = vectors[k, at + head * width : at + (head + 1) * width]
                        table[0, head, k] = numbers.to(table) * 2.0 ** units[turn]
                at, turn = at + heads * width, turn + 1
        cache.update(tables[0], tables[1], layer)
    if at != vectors.shape[1]:
        raise ValueError(f"a vector has {vectors.shape[1]} numbers and the layers take {at}")
    return cache
