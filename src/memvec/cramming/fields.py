"""The values that the fields of a recipe may have, and their conversion from text."""

from __future__ import annotations

from typing import Any, Literal, get_args

from memvec import registry
from memvec.errors import MemvecError

StartRuleName = Literal["vectors", "bos", "first-token", "paper"]
FrontName = Literal["none", "bos", "auto"]
UnitName = Literal["spread", "logits"]
ComputeName = Literal["auto", "model", "bfloat16"]
NotExactName = Literal["raise-margin", "stop"]

# Fields whose values are registered names, with the further names that each field accepts.
REGISTERED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("objective", "coordinates", "space", "optimizer", "schedule", "term"), ()),
    "start": ("auto", "encoder"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "start_rule": get_args(StartRuleName),
    "front": get_args(FrontName),
    "unit": get_args(UnitName),
    "compute": get_args(ComputeName),
    "if_not_exact": get_args(NotExactName),
}
# The minimum of each number.
MINIMUM: dict[str, float] = {
    "temperature": 1e-6,
    "context_scale": 1e-3,
    **dict.fromkeys(("margin", "lr", "lr_large", "lr_end", "beta1_rise", "weight_decay"), 0),
    **dict.fromkeys(("term_weight", "term_rise", "narrow_after", "stuck_after", "layer"), 0),
    **dict.fromkeys(("warmup", "decay", "settle", "steps", "budget", "corrections"), 0),
    **dict.fromkeys(("look_ahead", "dimensions", "objective_every", "align_layers"), 1),
    **dict.fromkeys(("query_count", "query_tokens", "teacher_top", "patience"), 1),
}


def choices(name: str) -> tuple[str, ...]:
    """The names that a field accepts, registered ones included."""
    return (*REGISTERED[name], *registry.names(name)) if name in REGISTERED else CHOICES[name]


def converted(name: str, value: Any, kind: type) -> Any:
    """A value, converted to the type of a field. Raises MemvecError if it cannot be converted."""
    try:
        cast = kind(value)
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and cast != value):
            raise ValueError
        return cast
    except (TypeError, ValueError, OverflowError):
        expected = {int: "a whole number", float: "a number"}.get(kind, "a name")
        raise MemvecError(f"the recipe's {name} must be {expected}, not '{value}'.") from None
