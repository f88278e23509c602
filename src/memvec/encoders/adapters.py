"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) for one pass of a frozen model.

Each linear map W x that the model calls becomes W x + U (D x); D (r, in) and U (out, r) are
trained, and W is frozen. The adapters are forward hooks that exist only while a passage is encoded,
so the model reads the vectors without them. (The library `peft` changes a model permanently, and is
an optional dependency here.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


def linear_maps(lm: FrozenLM) -> dict[str, nn.Module]:
    """The linear maps of the model by name, in the model's order, without the head."""
    head = lm.model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in lm.model.named_modules()
        if _sizes(module) is not None and module is not head
    }


@torch.no_grad()
def called_maps(lm: FrozenLM) -> list[str]:
    """Names of the linear maps that a forward pass calls.

    Hooks have no effect on the others: parts of the model that do not read text, experts that are
    not selected, and matrices that a fused kernel multiplies (Mamba's step sizes).
    """
    called: set[str] = set()
    maps = linear_maps(lm)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in maps.items()
    ]
    try:
        lm.own_logits(torch.arange(8, device=lm.device)[None] % lm.vocab_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in maps if name in called]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Widths of input and output of a linear map (or GPT-2's class for it); None for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    nx, nf = getattr(module, "nx", None), getattr(module, "nf", None)
    return (nx, nf) if isinstance(nx, int) and isinstance(nf, int) else None


class Adapters(nn.Module):
    """Pairs of matrices (D, U), one for each linear map in `names`; U begins at zero.

    Raises MemvecError if the model lacks one of the maps.
    """

    def __init__(self, lm: FrozenLM, names: Sequence[str], rank: int) -> None:
        super().__init__()
        maps = linear_maps(lm)
        if missing := [name for name in names if name not in maps]:
            raise MemvecError(
                f"this encoder adapts {missing[0]}, which {lm.name} has not: it was made for "
                "another model."
            )
        self.names = list(names)
        sizes = [_sizes(maps[name]) or (0, 0) for name in names]
        self.down = nn.ParameterList(
            torch.randn(rank, inputs) * max(1, inputs) ** -0.5 for inputs, _ in sizes
        )
        self.up = nn.ParameterList(torch.zeros(outputs, rank) for _, outputs in sizes)

    @contextlib.contextmanager
    def on(self, lm: FrozenLM) -> Iterator[None]:
        """Context manager: the model uses the adapters, in its own dtype, in this thread only.

        Other threads can use the same model at the same time, without the adapters.
        """
        maps, thread = linear_maps(lm), threading.get_ident()
        hooks = []
        try:
            for name, down, up in zip(self.names, self.down, self.up, strict=True):
                hooks.append(maps[name].register_forward_hook(_added(down, up, thread)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _added(down: Float[Tensor, "r in"], up: Float[Tensor, "out r"], thread: int) -> Any:
    """A forward hook that adds U (D x) to the output of a linear map, in one thread."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if threading.get_ident() != thread:
            return output
        x = inputs[0]
        return output + linear(linear(x, down.to(x)), up.to(x))  # a layer may be on any device

    return hook
