"""Files that are there whole or not at all, and JSON that every parser reads."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError


def path_of(path: str | os.PathLike[str]) -> Path:
    """A path that a person wrote, with the home folder for '~'; an unknown ~NAME stays as it is.

    Raises MemvecError for what is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise MemvecError(f"a path is a str or a Path, not {path!r:.60}.")
    return Path(os.path.expanduser(path))  # noqa: PTH111 (that of Path raises for such a NAME)


def write_atomically(target: Path, data: bytes) -> None:
    """Write aside, fsync, rename. Raises MemvecError with the reason, the target untouched."""
    aside: str | None = None
    try:
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(aside).chmod(0o666 & ~_umask())
        Path(aside).replace(target)
    except OSError as error:
        raise MemvecError(f"{target} cannot be written: {error.strerror}.") from None
    finally:
        if aside is not None:
            with contextlib.suppress(OSError):  # the folder went away, or is read-only now
                Path(aside).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for what is none, or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def pretty_json(value: Any) -> str:
    """JSON for people and machines; NaN and infinities become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
