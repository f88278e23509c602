"""A substitute for CUDA graphs on a CPU: it records operators with the tensors that they read and
write.

As on a GPU, a replay runs no Python code. It repeats the operators on the tensors of the capture,
so an input that is not copied into its place keeps its old values. Three rules make errors visible:

- what a capture computed is overwritten with NaN, because a GPU computes nothing in a capture;
- so is, at each replay, everything that other graphs of the pool made and this one does not read;
- an operator that makes a GPU wait, or copies from the computer's memory, raises as CUDA does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.lift_fresh.default,  # numbers of Python, copied to the device
}
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class NoWaiting(TorchDispatchMode):
    """Within, an operator for which a GPU would make the program wait raises."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func in BY_INDEX and any(t.dtype == torch.bool for t in tensors(args[1]))
        empty = func is aten.lift_fresh.default and not args[0].numel()  # nothing to copy
        if masked or (func in WAITS and not empty):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class Tape(NoWaiting):
    """The operators of one capture, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.read: set[int] = set()
        self.made: dict[int, Tensor] = {}  # by place; held, so that no place is used twice
        self.wiped: list[Tensor] = []  # all floats made, see `poison`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = {place(t) for t in tensors((args, kwargs))}
        self.read |= given
        results = tensors(out)
        new = [t for t in results if place(t) not in given]
        assert not new or len(new) == len(results), f"{func} gives tensors of both kinds"
        aliases = [argument.alias_info for argument in func._schema.arguments]
        writes = any(alias is not None and alias.is_write for alias in aliases)
        if new or writes:  # else a view, which stays where it is
            self.steps.append((func, args, kwargs or {}, new))
        self.made |= {place(t): t for t in new}
        return out

    def poison(self) -> None:
        if not self.wiped:
            # Other tensors at the same places: autograd counts no change of those made.
            floats = [t for t in self.made.values() if t.is_floating_point()]
            self.wiped = [t.new_empty(0).set_(t.untyped_storage()) for t in floats]
        torch._foreach_add_(self.wiped, torch.nan)

    def play(self) -> None:
        for func, args, kwargs, new in self.steps:
            again = tensors(func(*args, **kwargs))
            for kept, computed in zip(new, again, strict=False):
                kept.copy_(computed)


class Recorder:
    """The entry of `memvec.graphs.BACKENDS` for the CPU."""

    made: list[Recorder] = []  # noqa: RUF012  (those of one test, which empties the list)

    def __init__(self, device: torch.device) -> None:
        self.tapes: list[Tape] = []
        Recorder.made.append(self)

    def capture(
        self, work: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        tape = Tape()
        with tape, mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            outputs = work()
        self.tapes.append(tape)

        @torch.no_grad()
        def replay() -> None:
            for other in self.tapes:
                if not tape.read & other.made.keys() or other is tape:
                    other.poison()
            tape.play()

        # A backward pass reads these tensors while it is captured; a replay must write them anew.
        with torch.no_grad():
            tape.poison()
        return replay, outputs
