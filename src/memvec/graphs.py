"""Steps that a GPU replays instead of a launch for each kernel (CUDA graphs).

A step of few tokens makes thousands of short kernels, and telling a GPU about them takes longer
than computing them (docs/log.md, "The engine on a GPU, as it is"). The first step of a shape (slots
x columns) runs as it is, which warms up; the second is captured, and from then on replayed. A
capture is used only if its first replay gives what the step itself gives.

Two graphs a shape, because the weights of positions depend on the margins that the forward pass
measures:

    forward     vectors, ids, temperature -> states, and what `score` says of them
    backward    slope at the states -> gradient at the vectors

What lies between and after them (schedule, weights, optimiser, a second term) is a few kernels and
stays as it is. `torch.cuda.make_graphed_callables` splits a pass in the same way. Around the states
alone it would leave the head's losses outside, whose operators are more than those of the layers
where there are many positions (docs/log.md); it warms up three times, which an engine's first step
does anyway, and knows no device that a test could stand in for.

Graphs read and write at fixed addresses. Inputs are therefore copied into tensors that stay, and
what a replay leaves at its outputs holds until the next replay. All graphs of an engine share one
pool of memory: a backward pass always follows its own forward pass, so that no graph needs what
another one left there.
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

MAX_SHAPES = 32  # whose graphs are kept; of more, the least recently used is dropped
COLUMNS = 16  # the forward pass is as long as the longest counted part, rounded up to this
TOLERANCE = 0.02  # of the size of a figure: kernels that add in any order differ by less


class Backend(Protocol):
    """What captures work on a device."""

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """Do not compute, but note the work. Returns what repeats it, reading and writing at the
        same addresses, and the tensors that it writes."""


class CudaGraphs:
    """CUDA graphs in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """See `Backend`. Other threads (of a loader, say) may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self.pool, "stream": self.stream}
        # torch.cuda.graph does not leave its stream when a capture is broken off.
        current_stream = torch.cuda.stream(torch.cuda.current_stream(self.device))
        with current_stream, torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            outputs = work()
        return graph.replay, outputs


# Device type -> what captures there, made for a device.
BACKENDS: dict[str, Callable[[torch.device], Backend]] = {"cuda": CudaGraphs}


def whole_columns(need: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """`need` columns, rounded up to multiples of COLUMNS."""
    return -(-need // COLUMNS) * COLUMNS


def columns_for(need: int) -> int:
    """Columns of a forward pass in which `need` are predicted: multiples of COLUMNS, two lengths
    an octave, so that few graphs serve a passage that grows."""
    power = max(COLUMNS, 1 << (need - 1).bit_length())
    return power * 3 // 4 if power > 2 * COLUMNS and need <= power * 3 // 4 else power


def rows_for(taken: int, slots: int) -> int:
    """Rows of a forward pass with so many slots taken of so many: the next power of two, so that
    passages come and go within one shape."""
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
        """A `Pass`, replayed."""
        states: Tensor = _Replayed.apply(*inputs, self)  # type: ignore[no-untyped-call]
        loss, margin = self.scores.loss.clone(), self.scores.margin.clone()
        return states, Score(loss, margin, self.scores.gradient)


class Graphs:
    """A `Pass` with the same figures as `work`, replayed wherever a shape comes again.

    The states that it gives back serve as what a gradient is asked of, not as values: they, and
    `Score.gradient`, hold until the next call. Raises MemvecError for a device, a model or a
    second term that cannot be captured.
    """

    def __init__(self, work: Pass, module: FrozenLM, term: Term) -> None:
        if reason := why_not(module, term):
            raise MemvecError(f"graphs cannot be used: {reason}. Leave them out.")
        self.work, self.module = work, module
        memory.HOLDERS.add(self)
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        self.captured: dict[Any, Captured] = {}
        self.seen: set[Any] = set()
        self.backend: Backend | None = None  # made when something is captured

    def __call__(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """States, attached to the vectors, and their scores.

        Raises MemvecError if the model's code cannot be captured, torch.OutOfMemoryError if there
        is no room for it.
        """
        inputs = (vectors, ids, temperature)
        shape = (vectors.shape, ids.shape)
        if shape not in self.seen:
            self.seen.add(shape)
            return self.work(*inputs)
        if (captured := self.captured.pop(shape, None)) is None:
            captured = self._capture(*inputs)
            self._check(captured, *inputs)
        self.captured[shape] = captured  # the newest at the end
        if len(self.captured) > MAX_SHAPES:
            del self.captured[next(iter(self.captured))]
        return captured(*inputs)

    def _capture(self, *inputs: Tensor) -> Captured:
        """Both graphs for inputs of these shapes."""
        # Zeros, so that the check below sees an input that is not copied.
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
        """Raise MemvecError if a replay does not give what the work itself gives."""
        figures = []
        for run_pass in (self.work, captured):
            inputs = vectors.detach().requires_grad_()
            states, scores = run_pass(inputs, *fixed)
            (gradient,) = torch.autograd.grad(states, inputs, scores.gradient)
            figures.append([scores.loss, scores.margin, gradient])
        for computed, replayed in zip(*figures, strict=True):
            computed, replayed = computed.nan_to_num(), replayed.nan_to_num()
            if (computed - replayed).norm() > TOLERANCE * computed.norm():
                raise MemvecError(
                    f"graphs cannot be used: a replayed step of {self.module.name} gives other "
                    "figures than the step itself. Leave them out."
                )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong in a capture, as what it is: too little memory, or code that waits."""
        try:
            yield
        except RuntimeError as error:
            # The end of a capture that ran out of memory fails in its turn.
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
        return captured.states.detach()  # a tensor of its own, at the same address

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        captured: Captured = ctx.captured
        captured.slope.copy_(slopes[0])
        captured.backward()
        return captured.gradient.clone(), None, None, None


def why_not(module: FrozenLM, term: Term) -> str | None:
    """Why the steps of a model, with a second term, cannot be captured; None if nothing is known
    to be in the way."""
    name, device = module.name, module.device.type
    if device not in BACKENDS:
        return f"they are CUDA graphs, and {name} is on the {device}"
    if any(parameter.device != module.device for parameter in module.model.parameters()):
        return f"{name} is spread over several devices"
    if module.offload:
        return "with offload, a step waits for the computer's memory"
    if module.quantize:
        return f"{name} is quantized, and its kernels are not known to be replayable"
    if module.reading.crammer:
        return "passages that share a vector are not crammed in slots"
    if term.watches:
        return f"the term {type(term).__name__} reads along in the layers, which do not run again"
    return None


@contextlib.contextmanager
def consecutive_positions() -> Iterator[None]:
    """Within, transformers takes each row for one sequence, as it is, without looking.

    It looks at positions for packed sequences, which makes the device wait; while a graph is
    captured it cannot look, and would give every model a mask of all positions, with which
    attention takes a slower kernel (`masking_utils.find_packed_sequence_indices`, 5.24).
    """
    from transformers import masking_utils

    looks = getattr(masking_utils, "find_packed_sequence_indices", None)
    if looks is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks
