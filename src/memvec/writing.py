"""Write files atomically, read and write JSON, and read tensors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError


def path_of(path: str | os.PathLike[str]) -> Path:
    """A path in which '~' is replaced by the home folder; an unknown ~NAME is not replaced.

    Raises MemvecError for another type than `str` and paths.
    """
    if not isinstance(path, str | os.PathLike):
        raise MemvecError(f"a path is a str or a Path, not {path!r:.60}.")
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for ~NAME)


def write_atomically(target: Path, data: bytes) -> None:
    """Write a temporary file, fsync, rename. On MemvecError, the target is unchanged."""
    temporary = temporary_name(target)
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise MemvecError(f"{target} cannot be written: {error.strerror}.") from None
    finally:
        with contextlib.suppress(OSError):  # renamed, or the folder is gone or read-only
            temporary.unlink()


def temporary_name(target: Path) -> Path:
    """A hidden name in the same folder, for what is renamed to `target` once it is complete."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, if it does not exist. Raises MemvecError if that fails."""
    made = path_of(folder)
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemvecError(f"the folder {made} cannot be made: {error.strerror}.") from None
    return made


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for invalid or too deeply nested JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def copied_tensors(opened: Any, names: Iterable[str]) -> dict[str, Any]:
    """Tensors of an open safetensors file, copied.

    Without a copy their memory is the mapped file: if somebody writes to the file later, their
    numbers change after they were checked, or the process ends with SIGBUS.
    """
    return {name: opened.get_tensor(name).clone() for name in names}


def pretty_json(value: Any) -> str:
    """Indented JSON; NaN and infinities become null, so that every parser can read it."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
