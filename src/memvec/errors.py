"""Errors and warnings: one sentence, and an exit code for the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real

from pydantic import ValidationError


class MemvecError(Exception):
    """An error in one sentence that says what is wrong, where, and what to do. Exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class NotExactError(MemvecError):
    """A decoded text differs from the one that was crammed. Exit code 3.

    `memvec.cram` does not raise it; its result says which passages are not exact.
    """

    exit_code = 3


class SlowPathWarning(UserWarning):
    """Something takes a slower way than usual; the message says why."""


class UntestedVersionWarning(UserWarning):
    """A library is newer or older than the releases that memvec was tested with."""


def printable(text: str) -> str:
    """The text as one line, in which control characters are replaced by their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_minimum(minimum: int | float, /, **arguments: int | float | None) -> None:
    """Raise MemvecError for an argument that is below the minimum or not a number.

    None means that the argument was not given. If `minimum` is an `int`, values must be whole
    numbers.
    """
    kind, words = (Integral, "a whole number") if isinstance(minimum, int) else (Real, "a number")
    for name, value in arguments.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise MemvecError(f"{name} must be {words}, not {value!r:.60}.")
        if value is not None and not value >= minimum:
            raise MemvecError(f"{name} must be at least {minimum:g}, not {value!r}.")


def check_type(name: str, value: object, kind: type, source: str) -> None:
    """Raise MemvecError unless `value` is a `kind`; `source` names what returns one."""
    if not isinstance(value, kind):
        shown = repr(value).splitlines()[0][:60]  # the repr of a tensor or a model is long
        raise MemvecError(f"{name} is a memvec.{kind.__name__}, as {source} gives, not {shown}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, such as 'fill: Input should be a valid number'."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'everything'}: {first['msg']}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or the whole list."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}."
