"""What pydantic refuses in a spec, in the words of a TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WHOLE, _NUMBER, _TABLE = "must be a whole number", "must be a number", "must be a table"
# Of pydantic's kinds of errors, those that a TOML file can have.
_WORDS = {
    "tuple_type": "must be a list",
    "too_short": "must have at least one value",
    "too_long": "must have at most {max_length} values",
    "string_too_short": "must have at least one letter",
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_type": "must be text in quotes",
    "dict_type": _TABLE,
    "model_type": _TABLE,
    "model_attributes_type": _TABLE,
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
}
_EXAMPLES = {"recipe": " such as { steps = 400 }", "where": ' such as { split = "valid" }'}


def refusal(error: Any, loc: Sequence[Any]) -> str:
    """The end of a sentence about one of pydantic's errors: what must be there, and what is.

    `error` is an entry of `ValidationError.errors()`, `loc` the names and indices of its place.
    """
    if error["type"] == "missing":  # of a list with a fixed number of values
        return f"needs more than {loc[-1]} value{'' if loc[-1] == 1 else 's'}"
    rule = _WORDS.get(error["type"], error["msg"][0].lower() + error["msg"][1:])
    if rule == _TABLE:
        rule += _EXAMPLES.get(str(loc[-1]), "")
    else:
        rule = rule.format(**error.get("ctx", {}))
    return f"{rule}, not {error['input']!r}"


def place_of(loc: Sequence[Any]) -> str:
    """Names and indices as a person counts them: 'runs [1].vectors [2]'."""
    words = [f"[{part + 1}]" if isinstance(part, int) else str(part) for part in loc]
    return ".".join(words).replace(".[", " [") or "the spec"
