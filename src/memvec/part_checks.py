"""What a registered part of another package gives is checked wherever memvec uses it.

A tensor of a wrong shape is often broadcast without an error, and then passages influence each
other. So the parts that a step calls are checked: a part has the methods of its kind, these take
memvec's arguments, and their results have a row for each slot. Built-in parts are not checked; the
tests do that.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from memvec.errors import MemvecError

# The class from which a part is derived; optimizers and coordinates need the methods only.
BASES = {
    "objective": "memvec.cramming.objectives.Objective",
    "space": "memvec.model.reading.Reading",
    "schedule": "memvec.cramming.schedules.Schedule",
    "term": "memvec.cramming.terms.Term",
}
# The methods that memvec calls, with their arguments.
METHODS = {
    "objective": {
        "loss": "logits, ids, temperature, recipe",
        "weights": "counted, margin, target_margin",
    },
    "schedule": {
        "fresh": "size, enlarged",
        "counted": "state, length",
        "reached": "leading, hits",
        "temperature": "state, target_margin",
        "advance": "state, gained",
        "may_count": "steps",
        "out_of_patience": "state",
    },
    "coordinates": {"parameters": "vectors", "vectors": "parameters"},
    "optimizer": {
        "fresh": "parameters",
        "step": "parameters, gradient, state, moving, lr_scale",
    },
    "term": {
        "fresh": "passages",
        "measure": "vectors, batch, columns, padding_rows",
        "slopes": "measured, counted, padding_rows",
        "weight": "batch",
        "inputs": "counted",
    },
    "space": {
        "numbers": "lm",
        "begun_at": "lm, vectors",
        "inputs": "lm, vectors, ids, start_rule",
        "opening": "lm, vectors, given",
    },
}
# Methods whose result has a row for each slot; their last argument has one, too.
PER_SLOT = {
    "schedule": ("counted", "reached", "temperature", "advance", "out_of_patience"),
    "term": ("weight", "inputs"),
}
UNMOVED_STEPS = 20  # an optimizer may gather the gradients of a few steps before it moves


def guarded(kind: str, name: str, part: Any) -> Any:
    """`part` with a class whose methods check their results.

    Raises MemvecError if it lacks the base class or a method of its kind, or if a method cannot be
    called with memvec's arguments. The methods raise it for a result that memvec cannot use.
    """
    base = BASES.get(kind)
    lineage = {f"{c.__module__}.{c.__qualname__}": c for c in type(part).__mro__}
    if base is not None and base not in lineage:
        raise MemvecError(f"the {kind} '{name}' is no class derived from {base}.")
    for method, arguments in METHODS[kind].items():
        _check_method(kind, name, part, method, arguments)
    if kind == "space":
        _check_space(name, type(part), lineage[BASES[kind]])
    for method in PER_SLOT.get(kind, ()):
        _wrap(part, method, functools.partial(_check_rows, kind, name))
    for method, check in RESULTS.get(kind, {}).items():
        if getattr(part, method) is not None:  # an objective without a fast path
            named = check(name) if isinstance(check, type) else functools.partial(check, name)
            _wrap(part, method, named)
    return part


def check_tensor(kind: str, name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """Return `value` if it is a tensor of this shape. Raises MemvecError otherwise."""
    got = tuple(value.shape) if hasattr(value, "requires_grad") else type(value).__name__
    if got != tuple(shape):
        raise MemvecError(f"the {kind} '{name}' gives {got}, not a tensor of shape {tuple(shape)}.")
    if value.is_complex():
        raise MemvecError(f"the {kind} '{name}' gives complex numbers: return their real part.")
    return value


def _check_method(kind: str, name: str, part: Any, method: str, arguments: str) -> None:
    member = getattr(part, method, None)
    if not callable(member):
        raise MemvecError(f"the {kind} '{name}' has no method {method}.")
    try:
        inspect.signature(member).bind(*arguments.split(", "))
    except (TypeError, ValueError) as why:
        raise MemvecError(
            f"the {kind} '{name}' is called with {method}({arguments}): {why!s:.80}."
        ) from why


def _check_space(name: str, own: type, base: type) -> None:
    """Raise MemvecError for a space with other numbers that the model would read as inputs."""
    same = {m for m in ("numbers", "states", "inputs", "opening") if _is_same(own, base, m)}
    if "numbers" not in same and ("opening" in same or {"states", "inputs"} <= same):
        raise MemvecError(
            f"the space '{name}' has numbers of its own, so it needs the methods inputs and "
            "opening, too, which make inputs of them."
        )


def _is_same(own: type, base: type, method: str) -> bool:
    return getattr(own, method) is getattr(base, method)


def _wrap(part: Any, method: str, check: Callable[..., Any]) -> None:
    """Replace a method by one that returns `check(original, *arguments)`.

    It is a method of a new class, so that a copy of the part calls its own methods, and so that the
    part's class may have `__slots__`. Calls with keywords are the part's own, and are not checked.
    """
    own = type(part)
    # Not setattr: a frozen dataclass refuses it.
    if method in getattr(part, "__dict__", {}):  # the part set it in __init__
        checked = functools.partial(check, getattr(part, method))
        object.__setattr__(part, method, checked)
        return

    def inherited(self: Any, *arguments: Any, **named: Any) -> Any:
        original = getattr(super(with_check, self), method)
        return original(*arguments, **named) if named else check(original, *arguments)

    members = {"__slots__": (), "__module__": own.__module__, "__qualname__": own.__qualname__}
    fill = {**members, method: inherited}
    with_check = types.new_class(own.__name__, (own,), exec_body=lambda space: space.update(fill))
    object.__setattr__(part, "__class__", with_check)


def _check_rows(kind: str, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    return check_tensor(kind, name, method(*arguments), (len(arguments[-1]),))


def _loss(name: str, method: Callable[..., Any], logits: Any, ids: Any, *arguments: Any) -> Any:
    """The loss of each position; logits stay as they are, since margins are computed from them."""
    version = logits._version
    loss = check_tensor("objective", name, method(logits, ids, *arguments), ids.shape)
    if logits._version != version:
        raise MemvecError(f"the objective '{name}' changes its logits: write to a copy of them.")
    if not loss.requires_grad:
        raise MemvecError(
            f"the objective '{name}' gives losses without a gradient: compute them from the "
            "logits, without no_grad, detach or a comparison."
        )
    return loss


def _fused(name: str, method: Callable[..., Any], logits: Any, ids: Any, temperature: Any) -> Any:
    loss, margin, gradient = method(logits, ids, temperature)
    check_tensor("objective", name, loss, ids.shape)
    check_tensor("objective", name, margin, ids.shape)
    check_tensor("objective", name, gradient, logits.shape)
    return loss, margin, gradient


def _weights(name: str, method: Callable[..., Any], counted: Any, margin: Any, target: Any) -> Any:
    """The weights; 0 where a position does not count, since it may belong to another passage."""
    weights = check_tensor("objective", name, method(counted, margin, target), counted.shape)
    return weights.where(counted, 0)


def _fresh(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    state = method(*arguments)
    if not all(hasattr(state, field) for field in ("best", "stale", "enlarged", "lr_scale")):
        raise MemvecError(
            f"the schedule '{name}' keeps {type(state).__name__}: a dataclass derived from "
            "memvec.cramming.schedules.ScheduleState is needed."
        )
    return state


def _temperature(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
    temperature = method(*arguments)
    if not (temperature > 0).all():
        raise MemvecError(f"the schedule '{name}' gives a temperature that is not above 0.")
    return temperature


def _parameters(name: str, method: Callable[..., Any], vectors: Any) -> Any:
    parameters = method(vectors)
    shape = getattr(parameters, "shape", ())
    check_tensor("coordinates", name, parameters, (len(vectors), *shape[1:]))
    if not parameters.is_floating_point():
        raise MemvecError(f"the coordinates '{name}' gives parameters of {parameters.dtype}.")
    return parameters


def _vectors(name: str, method: Callable[..., Any], parameters: Any) -> Any:
    vectors = method(parameters)
    if parameters.requires_grad and not getattr(vectors, "requires_grad", True):
        raise MemvecError(
            f"the coordinates '{name}' gives vectors without a gradient: compute them from the "
            "parameters, without no_grad or detach."
        )
    return vectors


class _Step:
    """The check of an optimizer's step; it counts the steps after which nothing had moved."""

    def __init__(self, name: str) -> None:
        self.name, self.unmoved = name, 0

    def __call__(
        self, method: Callable[..., Any], parameters: Any, gradient: Any, state: Any, *rest: Any
    ) -> None:
        before, version = parameters.clone(), parameters._version
        if method(parameters, gradient, state, *rest) is not None:
            raise MemvecError(
                f"the optimizer '{self.name}' returns something: its step has to change the "
                "parameters in place and return nothing."
            )
        moving = rest[0]
        if parameters._version != version or not moving.any() or not parameters.equal(before):
            self.unmoved = 0
            return
        self.unmoved += 1
        if self.unmoved == UNMOVED_STEPS:
            raise MemvecError(
                f"the optimizer '{self.name}' changed no parameters in {UNMOVED_STEPS} steps: "
                "write into them, as parameters.sub_(change) does."
            )


def _measure(name: str, method: Callable[..., Any], vectors: Any, batch: Any, *rest: Any) -> Any:
    """What a term measures: a loss for each slot, and what the gradient flows through."""
    measured = method(vectors, batch, *rest)
    loss = check_tensor("term", name, getattr(measured, "loss", None), (len(batch),))
    outputs = measured.outputs
    attached = isinstance(outputs, tuple) and all(
        getattr(output, "requires_grad", False) and output.shape[:1] == vectors.shape[:1]
        for output in outputs
    )
    if not attached:
        raise MemvecError(
            f"the term '{name}' gives other outputs than a tuple of tensors that are attached to "
            "the vectors, with a row for each row of these."
        )
    if loss.requires_grad and not outputs:
        raise MemvecError(
            f"the term '{name}' gives no outputs, so its loss would move nothing: "
            "TermLoss(loss.detach(), outputs, gradients)."
        )
    return measured


def _slopes(name: str, method: Callable[..., Any], measured: Any, *arguments: Any) -> Any:
    slopes = method(measured, *arguments)
    wanted = [tuple(output.shape) for output in measured.outputs]
    got = [tuple(getattr(slope, "shape", ())) for slope in slopes]
    if got != wanted:
        raise MemvecError(
            f"the term '{name}' gives gradients of shapes {got} at outputs of shapes {wanted}: "
            "each output needs a gradient of its shape."
        )
    return slopes


# What is checked of the results of the other methods.
RESULTS: dict[str, dict[str, Callable[..., Any]]] = {
    "objective": {"loss": _loss, "fused": _fused, "weights": _weights},
    "schedule": {"fresh": _fresh, "temperature": _temperature},
    "coordinates": {"parameters": _parameters, "vectors": _vectors},
    "optimizer": {"step": _Step},
    "term": {"measure": _measure, "slopes": _slopes},
}
