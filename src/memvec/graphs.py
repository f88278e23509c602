"""CUDA graphs of the forward and backward passes of a step, which save the launch of each kernel.

A step with few tokens consists of thousands of short kernels, whose launches take longer than their
computation (docs/log.md, 2026-11-27, "On a GPU, small steps wait for kernel launches"). The first
step of a shape (slots x columns) runs normally, which is the warm-up. The second step captures the
graphs. All further steps of this shape replay them. A capture is used only if its first replay
gives the results of the step.

Each shape has two graphs, because the weights of positions depend on the margins that the forward
pass measures:

    forward     vectors, ids, temperature -> states, and the results of `score`
    backward    gradient at the states -> gradient at the vectors

The rest of a step (schedule, weights, optimiser, a second term) takes few kernels and is not
captured. `torch.cuda.make_graphed_callables` also splits a pass in two. It is not used here for
three reasons. A graph of the states alone leaves out the losses, which have more operators than the
layers if there are many positions (docs/log.md). It warms up three times, although the first step
is a warm-up. It cannot be tested without a GPU.

Graphs read and write at fixed addresses. So inputs are copied into tensors that are kept, and the
outputs of a replay are valid until the next replay. All graphs of an engine share one memory pool.
This is safe because each backward pass follows its own forward pass, so no graph needs data that
another graph may have overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.errors import MemvecError, first_line
from memvec.model import memory
from memvec.model.lm import FrozenLM
from memvec.results import Score

if TYPE_CHECKING:
    from memvec.cramming.terms import Term

# (vectors, ids, temperature) -> states, and their losses, margins and gradients
Pass = Callable[
    [Float[Tensor, "N K D"], Int[Tensor, "N n"], Float[Tensor, " N"]],
    tuple[Float[Tensor, "N T H"], Score],
]
Replay = Callable[[], None]

MAX_SHAPES = 32  # maximum number of shapes with graphs; the least recently used is dropped
COLUMNS = 16  # the number of columns of a forward pass is rounded up to a multiple of this
# Allowed relative error of a replay, since kernels add in no fixed order. Where a step differs more
# from itself, twice this difference: in a deep model, bfloat16 makes a few percent of it.
TOLERANCE = 0.02


class Backend(Protocol):
    """A device's way to capture and replay work."""

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """Record the kernels of `work` without computing them; returns a replay and the outputs.

        The replay reads and writes at the same addresses; each call overwrites the outputs.
        """


class CudaGraphs:
    """Captures CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """See `Backend`. Other threads, such as data loaders, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self.pool, "stream": self.stream}
        # torch.cuda.graph does not leave its stream if a capture fails.
        current_stream = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with current_stream, torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            outputs = work()
        return graph.replay, outputs


# Device type -> constructor of the backend for a device.
BACKENDS: dict[str, Callable[[torch.device], Backend]] = {"cuda": CudaGraphs}


def whole_columns(need: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """`need` columns, rounded up to a multiple of COLUMNS."""
    return -(-need // COLUMNS) * COLUMNS


def columns_for(need: int) -> int:
    """Columns of a captured forward pass that needs `need` columns: 2^i or 3/4 of it.

    They are multiples of COLUMNS. Few sizes mean few graphs while the counted tokens grow.
    """
    power = max(COLUMNS, 1 << (need - 1).bit_length())
    return power * 3 // 4 if power > 2 * COLUMNS and need <= power * 3 // 4 else power


def rows_for(taken: int, slots: int) -> int:
    """Rows of a captured forward pass: `taken` rounded up to a power of two, at most `slots`.

    So the shape rarely changes when passages enter and leave slots.
    """
    return min(slots, 1 << (taken - 1).bit_length())


@dataclass(frozen=True)
class Captured:
    """Both graphs of one shape, and the tensors that they read and write."""

    inputs: tuple[Tensor, ...]  # vectors, ids, temperature
    forward: Replay
    states: Float[Tensor, "N T H"]
    scores: Score
    slope: Float[Tensor, "N T H"]
    backward: Replay
    gradient: Float[Tensor, "N K D"]

    def __call__(self, *inputs: Tensor) -> tuple[Float[Tensor, "N T H"], Score]:
        """Replay the forward pass, with the signature of `Pass`."""
        states: Tensor = _Replayed.apply(*inputs, self)  # type: ignore[no-untyped-call]
        loss, margin = self.scores.loss.clone(), self.scores.margin.clone()
        return states, Score(loss, margin, self.scores.gradient)


class Graphs:
    """A `Pass` with the results of `work`, which is captured and replayed for repeated shapes.

    The returned states and `Score.gradient` are valid until the next call. Use the states only to
    compute gradients. Raises MemvecError for a device, a model or a second term that cannot be
    captured.
    """

    def __init__(self, work: Pass, module: FrozenLM, term: Term) -> None:
        if reason := why_not(module, term):
            raise MemvecError(f"graphs cannot be used: {reason}. Leave them out.")
        self.work, self.module = work, module
        memory.HOLDERS.add(self)
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and free their memory."""
        self.captured: dict[Any, Captured] = {}
        self.seen: set[Any] = set()
        self.backend: Backend | None = None  # made at the first capture

    def __call__(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """States, attached to the vectors, and their scores.

        Raises MemvecError if the model's code cannot be captured, and torch.OutOfMemoryError if
        memory is too small for a capture.
        """
        inputs = (vectors, ids, temperature)
        shape = (vectors.shape, ids.shape)
        if shape not in self.seen:
            self.seen.add(shape)
            return self.work(*inputs)
        if (captured := self.captured.pop(shape, None)) is None:
            captured = self._capture(*inputs)
            self._check(captured, *inputs)
        self.captured[shape] = captured  # the most recently used shape is last
        if len(self.captured) > MAX_SHAPES:
            del self.captured[next(iter(self.captured))]
        return captured(*inputs)

    def _capture(self, *inputs: Tensor) -> Captured:
        """Both graphs for inputs of these shapes."""
        # The buffers begin as zeros, so that `_check` detects an input that is not copied.
        buffers = tuple(torch.zeros_like(tensor.detach()) for tensor in inputs)
        if self.backend is None:
            self.backend = BACKENDS[self.module.device.type](self.module.device)
        backend = self.backend
        vectors = buffers[0].requires_grad_()

        def forward() -> tuple[Tensor, ...]:
            with torch.enable_grad(), consecutive_positions():
                states, scores = self.work(*buffers)
            return states, scores.loss, scores.margin, scores.gradient

        with self._explained():
            replay, (states, *figures) = backend.capture(forward)
            slope = torch.zeros_like(states)
            again, (gradient,) = backend.capture(
                lambda: torch.autograd.grad(states, vectors, slope)
            )
        scores = Score(*figures)
        return Captured(buffers, replay, states.detach(), scores, slope, again, gradient)

    def _check(self, captured: Captured, vectors: Tensor, *fixed: Tensor) -> None:
        """Raise MemvecError if a replay does not give the results of the work itself."""
        figures = []
        for run_pass in (self.work, captured, self.work):
            inputs = vectors.detach().requires_grad_()
            states, scores = run_pass(inputs, *fixed)
            (gradient,) = torch.autograd.grad(states, inputs, scores.gradient)
            figures.append([scores.loss, scores.margin, gradient])
        for computed, replayed, again in zip(*figures, strict=True):
            computed = computed.nan_to_num()
            error, own = ((computed - x.nan_to_num()).norm() for x in (replayed, again))
            if error > torch.maximum(TOLERANCE * computed.norm(), 2 * own):
                raise MemvecError(
                    f"graphs cannot be used: a replayed step of {self.module.name} gives other "
                    "figures than the step itself. Leave them out."
                )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Context manager that turns errors of a capture into OutOfMemoryError or MemvecError."""
        try:
            yield
        except RuntimeError as error:
            # If memory runs out in a capture, ending the capture raises a second error.
            if any(memory.out_of_memory(e) for e in (error, error.__context__) if e is not None):
                raise torch.OutOfMemoryError("no memory to capture a step") from error
            reason, name = first_line(error), self.module.name
            raise MemvecError(
                f"graphs cannot be used: a step of {name} cannot be captured ({reason}). Leave "
                "them out."
            ) from error


class _Replayed(torch.autograd.Function):
    """The states of a replayed forward pass, whose backward pass is replayed too."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, ids: Tensor, temperature: Tensor, captured: Captured
    ) -> Tensor:
        for buffer, new in zip(captured.inputs, (vectors, ids, temperature), strict=True):
            buffer.copy_(new)
        captured.forward()
        ctx.captured = captured
        return captured.states.detach()  # a new tensor object at the same address

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        captured: Captured = ctx.captured
        captured.slope.copy_(slopes[0])
        captured.backward()
        return captured.gradient.clone(), None, None, None


def why_not(module: FrozenLM, term: Term) -> str | None:
    """The reason why steps of a model with a second term cannot be captured; None: no known one."""
    name, device = module.name, module.device.type
    if device not in BACKENDS:
        return f"they are CUDA graphs, and {name} is on the {device}"
    if any(parameter.device != module.device for parameter in module.model.parameters()):
        return f"{name} is spread over several devices"
    if module.offload:
        return "with offload, a step waits for the computer's memory"
    if module.quantize:
        return f"{name} is quantized, and its kernels are not known to be replayable"
    if module.reading.shares_vector:
        return "passages that share a vector are not crammed in slots"
    if term.watches:
        return f"the term {type(term).__name__} reads along in the layers, which do not run again"
    return None


@contextlib.contextmanager
def consecutive_positions() -> Iterator[None]:
    """Context manager: transformers treats each row as one sequence, and does not check it.

    It checks position ids for packed sequences, which synchronises with the device. During a
    capture it cannot check, and would use a full attention mask, for which attention has only a
    slower kernel (`masking_utils.find_packed_sequence_indices`, 5.24). FlashAttention checks again
    in every layer, for a batch of one row.
    """
    from transformers import masking_utils, modeling_flash_attention_utils

    masks, flash = vars(masking_utils), vars(modeling_flash_attention_utils)
    checks = [(masks, "find_packed_sequence_indices", None), (flash, "_is_packed_sequence", False)]
    changed = [(names, {name: names[name]}) for names, name, _ in checks if name in names]
    try:
        for names, name, packed in checks:
            names[name] = lambda *_, packed=packed, **__: packed
        yield
    finally:
        for names, original in changed:
            names.update(original)
