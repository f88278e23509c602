"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from memvec.errors import MemvecError


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
            Path(aside).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
