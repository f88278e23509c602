"""Which values the fields of a recipe can have, and how they are read from text."""

from __future__ import annotations

from typing import Any, Literal, get_args

from memvec import registry
from memvec.errors import MemvecError

StartRuleName = Literal["vectors", "bos", "first-token", "paper"]
FrontName = Literal["none", "bos", "auto"]
UnitName = Literal["spread", "logits"]
ComputeName = Literal["auto", "model", "bfloat16"]
NotExactName = Literal["raise-margin", "stop"]

# Fields whose values are names of the registry, and names that stand beside the registered ones.
REGISTERED: dict[str, tuple[str, ...]] = {
    "objective": (),
    "coordinates": (),
    "space": (),
    "optimizer": (),
    "schedule": (),
    "term": (),
    "start": ("auto", "encoder"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "start_rule": get_args(StartRuleName),
    "front": get_args(FrontName),
    "unit": get_args(UnitName),
    "compute": get_args(ComputeName),
    "if_not_exact": get_args(NotExactName),
}
MINIMUM: dict[str, float] = {
    "temperature": 1e-6,
    "margin": 0.0,
    "look_ahead": 1,
    "narrow_after": 0,
    "stuck_after": 0,
    "dimensions": 1,
    "layer": 0,
    "lr": 0.0,
    "lr_large": 0.0,
    "warmup": 0,
    "decay": 0,
    "lr_end": 0.0,
    "beta1_rise": 0.0,
    "weight_decay": 0.0,
    "term_weight": 0.0,
    "term_rise": 0.0,
    "context_scale": 1e-3,
    "objective_every": 1,
    "align_layers": 1,
    "query_count": 1,
    "query_tokens": 1,
    "teacher_top": 1,
    "settle": 0,
    "steps": 0,
    "patience": 1,
    "budget": 0,
    "corrections": 0,
}


def choices(name: str) -> tuple[str, ...]:
    """The values that a field of names can have; registered ones included."""
    return (*REGISTERED[name], *registry.names(name)) if name in REGISTERED else CHOICES[name]


def converted(name: str, value: Any, kind: type) -> Any:
    """A value as a field's type. Raises MemvecError if it cannot be that."""
    try:
        cast = kind(value)
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and cast != value):
            raise ValueError
        return cast
    except (TypeError, ValueError, OverflowError):
        expected = {int: "a whole number", float: "a number"}.get(kind, "a name")
        raise MemvecError(f"the recipe's {name} must be {expected}, not '{value}'.") from None
