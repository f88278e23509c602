"""Types and shapes of every call into memvec, checked at a fraction of jaxtyping's own cost.

pytest runs with `--jaxtyping-packages`, whose import hook puts `@jaxtyping.jaxtyped(...)` on every
function and class of memvec. That decorator binds the arguments to a signature, checks them, calls
the function and checks arguments and result together. It also makes its checks again each time that
a function inside another is defined. This took half of the suite's processor time. The decorator of
this module checks arguments and result once each, and makes a function's checks once, at its first
call. In each test it checks the first `FIRST` calls of a function, and then one in `EVERY`, because
a loop of steps calls each function with the same types a thousand times. Where shapes have letters,
it does not check a call again whose arguments and result are of the same kinds (class, shape,
dtype, value of a text) as those of an earlier right call.

As in jaxtyping, a letter of shapes (B, K, T, D, V) is the same number within one call, and
`jaxtyping_disable` switches all checks off.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import jaxtyping
import numpy as np
import torch
from beartype import BeartypeConf, beartype

Check = Callable[..., Any]
config = jaxtyping.config
checking = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
one_call = functools.partial(jaxtyping.jaxtyped, "context")  # within, letters keep their numbers
# By the identity of a function's code, which is kept (two functions may have equal code): the
# checks of arguments and result, whether shapes have letters, and the kinds of earlier right calls.
known: dict[int, tuple[types.CodeType, Check, Check, bool, set[Any]]] = {}
FIRST, EVERY = 32, 16
MANY = 1000  # kinds of calls that are kept of a function
calls: dict[int, int] = {}  # by the same identity, since the test began (tests/conftest.py)


def jaxtyped(*, typechecker: object) -> Callable[[Any], Any]:
    """The decorator, as the import hook calls it."""
    return checked


def checked(what: Any) -> Any:
    """The function with its types checked at each call; of a class, a dataclass's `__init__`."""
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what) and not hasattr(what.__init__, "checks"):
            what.__init__ = checked(what.__init__)
        return what
    code = what.__code__
    key = id(code)

    @functools.wraps(what)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return what(*args, **kwargs)
        calls[key] = number = calls.get(key, 0) + 1
        if number > FIRST and number % EVERY:  # nearly all calls end here, so it is short
            return what(*args, **kwargs)
        if key not in known:
            known[key] = (code, *checks_of(what), set())
        _, takes, gives, has_letters, right = known[key]
        if not has_letters:
            takes(*args, **kwargs)
            return gives(what(*args, **kwargs))
        given = kind_of((args, *kwargs.items()))
        if given not in right:
            with one_call():
                takes(*args, **kwargs)
                result = gives(what(*args, **kwargs))
        else:
            result = what(*args, **kwargs)
            if (given, kind_of(result)) in right:
                return result
            with one_call():
                takes(*args, **kwargs)
                gives(result)
        if given is not None and (kind := kind_of(result)) is not None:
            if len(right) > MANY:
                right.clear()
            right.update((given, (given, kind)))
        return result

    call.checks = True
    return call


def kind_of(value: Any) -> Any:
    """What checks look at in a value, hashable; None if that is the contents of a container."""
    cls = type(value)
    if cls not in looked_at:
        looked_at[cls] = next(how for kinds, how in LOOKS if issubclass(cls, kinds))
    how = looked_at[cls]
    return cls if how is None else how(cls, value)


def of_items(cls: type, items: Any) -> Any:
    """The kinds of a few items."""
    kinds = (cls, *map(kind_of, items)) if len(items) < 12 else (None,)
    return None if None in kinds else kinds


LOOKS: list[tuple[Any, Callable[[type, Any], Any] | None]] = [
    ((torch.Tensor, np.ndarray), lambda cls, array: (cls, array.shape, array.dtype)),
    ((tuple, list), of_items),
    ((str, bytes, bool, type(None), type), lambda cls, value: (cls, value)),
    ((Collection, types.SimpleNamespace), lambda cls, value: None),
    (object, None),  # its class alone
]
looked_at: dict[type, Callable[[type, Any], Any] | None] = {}


def checks_of(function: types.FunctionType) -> tuple[Check, Check, bool]:
    """A function that checks the arguments, one that checks the result and returns it, and whether
    any type has letters of shapes."""
    signature, empty = inspect.signature(function), inspect.Parameter.empty
    hints = {name: hint_of(p.annotation, function) for name, p in signature.parameters.items()}
    result = hint_of(signature.return_annotation, function)
    plain = [
        p.replace(annotation=empty, default=empty if p.default is empty else None)
        for p in signature.parameters.values()
    ]
    names = signature.replace(parameters=plain, return_annotation=empty)
    made: dict[str, Any] = {}
    exec(f"def takes{names}: pass\ndef gives(result): return result", made)
    for one, types_of in (("takes", hints), ("gives", {"return": result})):
        made[one].__annotations__ = {k: v for k, v in types_of.items() if v is not Any}
        made[one].__qualname__, made[one].__module__ = function.__qualname__, function.__module__
    made["takes"].__defaults__ = function.__defaults__
    made["takes"].__kwdefaults__ = function.__kwdefaults__
    shaped = any(has_shape(hint) for hint in (*hints.values(), result))
    return checking(made["takes"]), checking(made["gives"]), shaped


def hint_of(annotation: Any, function: types.FunctionType) -> Any:
    """The type of an annotation, which may be a string; Any if none or imported for mypy only."""
    if annotation is inspect.Parameter.empty:
        return Any

    def it() -> None: ...

    it.__annotations__ = {"it": annotation}
    try:
        return typing.get_type_hints(it, function.__globals__, include_extras=True)["it"]
    except Exception:
        return Any


def has_shape(hint: Any) -> bool:
    """Whether an array with letters is part of a type."""
    array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return array or any(has_shape(inner) for inner in typing.get_args(hint))


jaxtyping.jaxtyped = jaxtyped
