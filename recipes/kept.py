"""Records of the options with which the contents of --work were made.

Contents of other options in --work are an error, so that results of different options are never
joined. Other programs import this module; it is not run.
"""

import hashlib
import json
from pathlib import Path

from memvec.errors import MemvecError


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's .txt files."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    folder_hash = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")):
        name = str(file.relative_to(path))
        folder_hash.update(f"{name} {digest(file)}\n".encode())
    return folder_hash.hexdigest()


def write(path: Path, record: dict) -> None:
    """Write a record as JSON. The file gets its name when it is complete."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def refuse_others(what: str, record: dict, requested: dict, remedy: str) -> None:
    """Raise MemvecError if a field of `record` differs from that in `requested`.

    `what` names the recorded thing, and `remedy` says what to do. A field that the record lacks was
    added to the program later, and is not compared.
    """
    requested = json.loads(json.dumps(requested))
    for name, value in requested.items():
        if record.get(name, value) != value:
            raise MemvecError(f"{what} has {name} {record[name]}, not {value}: {remedy}.")
