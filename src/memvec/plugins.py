"""Plug-ins: importing other packages, and names with arguments.

A registered function or class may have keyword-only parameters with defaults. The name that selects
it sets them, as in `hinge(factor=3.0)`: in a recipe, on the command line
(`--set "objective=hinge(factor=3.0)"`) and in the spec of a study. So records, files and keys
contain the values as part of the name.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError, did_you_mean
from memvec.writing import path_of

GROUP = "memvec.plugins"
FILES = "MEMVEC_PLUGINS"  # environment variable: Python files, separated as in PATH
# The end of a sentence that lists the known names of a kind.
ADD = "; if it is a plug-in's, install it or name its file in MEMVEC_PLUGINS."
# Kinds whose names may have arguments: those that a recipe names, except the space, whose options
# are in the file of vectors.
WITH_ARGUMENTS = {"preset", "objective", "term", "queries", "schedule", "coordinates", "optimizer"}
WITH_ARGUMENTS |= {"start"}
RESERVED = {"start": ("auto", "encoder")}  # names with a meaning of their own in a recipe


@functools.cache
def load_plugins() -> None:
    """Import what installed packages declare as `memvec.plugins`, and the files of MEMVEC_PLUGINS.

    Each is imported once. Raises MemvecError, with the name of the package or file, if an import
    fails.
    """
    files = [path_of(name) for name in os.environ.get(FILES, "").split(os.pathsep) if name]
    named = [(p.name, p.value, p.load) for p in entry_points(group=GROUP)]
    named += [(file.name, FILES, functools.partial(_run_file, file)) for file in files]
    for name, where, load in named:
        try:
            load()
        except Exception as error:  # another package's code may raise any error
            raise MemvecError(
                f"the plug-in '{name}' ({where}) cannot be imported: {error}"
            ) from error


def _run_file(file: Path) -> None:
    """Import a Python file by its path, as `memvec_plugin_NAME` if a module NAME is imported.

    Nothing is done if a module is that file: a script or its import has registered the parts.
    """
    if any(_is_file(module, file) for module in list(sys.modules.values())):
        return
    name = file.stem if file.stem not in sys.modules else f"memvec_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file (NAME.py).")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _is_file(module: Any, file: Path) -> bool:
    """True if a module was made from this file."""
    place = getattr(module, "__file__", None)
    return isinstance(place, str) and Path(place).name == file.name and _same(Path(place), file)


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def known(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown part: the nearest name, or all and how to add more."""
    end = did_you_mean(word, names)
    if end.endswith("?"):
        return end
    return end[:-1] + ADD


def check_name(kind: str, name: str) -> None:
    """Raise MemvecError for a name that cannot be registered: empty, with brackets, or reserved."""
    if not isinstance(name, str) or not name.strip() or set(name) & set("()"):
        raise MemvecError(f"no {kind} can be called {name!r}: give it a name without brackets.")
    if name in RESERVED.get(kind, ()):
        raise MemvecError(
            f"the name '{name}' is taken by another {kind}: register yours under another one."
        )


def check_arguments(kind: str, name: str, choice: Any, described: str) -> None:
    """Raise MemvecError unless `choice` takes the arguments in `described`, its kind's text."""
    call = re.match(r"(?:a class made from )?\((.*?)\)", described)
    if call is None or (kind == "objective" and isinstance(choice, type)):
        return
    try:
        inspect.signature(choice).bind(*re.findall(r"\w+", call[1]))
    except (TypeError, ValueError) as why:
        raise MemvecError(f"the {kind} '{name}' is called with ({call[1]}): {why!s:.80}.") from why


def plain(text: str) -> str:
    """The name without arguments; `texts(1).txt` has none, since it does not end in a bracket."""
    return text.partition("(")[0] if text.endswith(")") else text


def split(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of `name(argument=value, ...)`; a plain name has none.

    Values are finite numbers, quoted strings, True or False. Raises MemvecError for other values,
    for an argument that is given twice, and for a text that is not of this form.
    """
    name, bracket, _ = text.partition("(")
    if not bracket:
        return text, {}
    try:
        call = ast.parse("made" + text[len(name) :], mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        arguments = {item.arg or "": ast.literal_eval(item.value) for item in call.keywords}
        if len(arguments) < len(call.keywords):
            raise ValueError
        for value in arguments.values():
            if not isinstance(value, int | float | str) or value in (math.inf, -math.inf):
                raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: deep nesting
        raise MemvecError(
            f"'{text}' cannot be read: an argument is NAME=VALUE, with text in quotes, as in "
            f"{name}(factor=3.0, kind='soft')."
        ) from None
    return name, arguments


def spelled(name: str, arguments: Mapping[str, Any]) -> str:
    """The canonical spelling of a name with arguments: sorted, with single spaces."""
    inner = ", ".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))
    return f"{name}({inner})" if inner else name


def without_folders(text: str, file: bool) -> str:
    """A name in which arguments that are absolute paths are replaced by their last parts.

    With `file`, a text that is not a name with arguments is itself a path, and is replaced, too.
    """
    name, arguments = plain(text), {}
    with contextlib.suppress(MemvecError):
        arguments = split(text)[1] if name == Path(name).name else {}
    if not arguments:
        return Path(text).name if file else text
    for key, value in arguments.items():
        if str(value).startswith("~") or Path(str(value)).is_absolute():
            arguments[key] = Path(value).name
    return spelled(name, arguments)


def bound(kind: str, name: str, choice: Any, arguments: Mapping[str, Any]) -> Any:
    """The function or class with its keyword-only parameters set; a class stays a class.

    Raises MemvecError for an argument that it does not have.
    """
    parameters = inspect.signature(choice).parameters.values() if kind in WITH_ARGUMENTS else ()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for key in arguments:
        if not own:
            raise MemvecError(
                f"the {kind} '{name}' has no arguments of its own: leave out '{key}'."
            )
        if key not in own:
            raise MemvecError(f"the {kind} '{name}' has no '{key}': {did_you_mean(key, own)}")
    if not isinstance(choice, type):
        return functools.partial(choice, **arguments)

    # A partial would hide the attributes of the class (`step_type` of a term), and that it is a
    # class: an objective that is a class is instantiated, a function is the loss itself.
    class Bound(choice):  # type: ignore[misc]
        __doc__, __module__ = choice.__doc__, choice.__module__
        __init__ = functools.partialmethod(choice.__init__, **arguments)

    Bound.__name__ = Bound.__qualname__ = choice.__name__
    return Bound
