"""Vectors of a space turned into a model's inputs, slowly and independently of the fast path.

Keys and values are written into a DynamicCache number by number, in the order of the file: layer by
layer first the keys, then the values, and within these head by head. The number of heads of a
layer, and the keys and values of layers that are not trained, come from the model's own forward on
filler tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memvec.model.lm import FrozenLM


def front(lm: FrozenLM, vectors: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Inputs (K, D) for vectors of W numbers (K, W), and further arguments of the model's forward.

    Where the vectors are keys and values, there are no inputs and the arguments hold a cache. In
    the space 'shared-basis' the inputs are the vectors times the basis, float32 on the CPU.
    """
    space, options = lm.reading.space, lm.reading.options
    if space == "shared-basis":
        basis = lm.reading.vectors_of(torch.eye(vectors.shape[1]))  # type: ignore[attr-defined]
        return (vectors.cpu().double() @ basis.double()).float(), {"use_cache": False}
    if space in ("prefix", "prefix-layer"):
        argument = str(lm.caching.argument)
        trained = [options["layer"]] if space == "prefix-layer" else None
        filler = options.get("filler", 0)
        cache = _cache(
            lm, argument, vectors, units=options["units"], trained=trained, filler=filler
        )
        return None, {"use_cache": True, argument: cache}
    return vectors, {"use_cache": False}


@torch.no_grad()
def _cache(
    lm: FrozenLM,
    argument: str,
    vectors: Tensor,
    *,
    units: list[int],
    trained: list[int] | None,
    filler: int,
) -> Any:
    from transformers import DynamicCache

    K = len(vectors)
    fillers = DynamicCache()  # keys and values of K filler tokens, in all layers
    lm.model(input_ids=torch.full((1, K), filler, device=lm.device), **{argument: fillers})
    cache, at, turn = DynamicCache(), 0, 0
    for layer, layer_cache in enumerate(fillers.layers):
        tables = [layer_cache.keys.clone(), layer_cache.values.clone()]
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
