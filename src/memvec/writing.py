"""Write files atomically, read and write JSON, and read tensors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
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
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except OSError as error:
        raise MemvecError(f"{target} cannot be written: {error.strerror}.") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # renamed, or the folder is gone or read-only
                Path(temporary).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
