"""What memvec says when something is wrong: one sentence, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real

from pydantic import ValidationError


class MemvecError(Exception):
    """Something a person can act on: what is wrong, where, and what to do. Exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class NotExactError(MemvecError):
    """A text or an export did not come back as it was crammed. Exit code 3.

    `memvec.cram` does not raise it: what is not exact is in its result.
    """

    exit_code = 3


class SlowPathWarning(UserWarning):
    """A model is served by a slower path than the usual one; the message says why."""


class UntestedVersionWarning(UserWarning):
    """A library is newer than the newest release that memvec was tested with."""


def printable(text: str) -> str:
    """Text from outside as one line: what a terminal would obey is written as its escape."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def check_minimum(minimum: int | float, /, **arguments: int | float | None) -> None:
    """Raise MemvecError, which names the argument, for a value below the minimum or no number.

    None is one that was not given. With an `int` as the minimum, every value is a whole number.
    """
    whole = isinstance(minimum, int)
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Integral if whole else Real):
            kind = "a whole number" if whole else "a number"
            raise MemvecError(f"{name} must be {kind}, not {value!r:.60}.")
        if value is not None and not value >= minimum:
            raise MemvecError(f"{name} must be at least {minimum:g}, not {value!r}.")


def check_type(name: str, value: object, kind: type, source: str) -> None:
    """Raise MemvecError for an argument of another class; `source` makes one of the right class."""
    if not isinstance(value, kind):
        shown = repr(value).splitlines()[0][:60]  # of a tensor or a model, no more
        raise MemvecError(f"{name} is a memvec.{kind.__name__}, as {source} gives, not {shown}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: ValidationError) -> str:
    """The first field that pydantic refuses, and why: 'fill: Input should be a valid number'."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'everything'}: {first['msg']}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or the whole list."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}."
