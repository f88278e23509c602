"""With what the contents of --work were made: nothing made otherwise is joined to them.

Used by the programs that keep something; nothing to run here.
"""

import hashlib
import json
from pathlib import Path


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's .txt files."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    both = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")):
        name = str(file.relative_to(path))
        both.update(f"{name} {digest(file)}\n".encode())
    return both.hexdigest()


def write(path: Path, made: dict) -> None:
    """Write a record under its name only once it is complete."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(made, indent=1) + "\n")
    aside.replace(path)


def refuse_others(what: str, made: dict, asked: dict, remedy: str) -> None:
    """End the program if something was made in another way than is asked for now.

    A field that the record lacks is newer than it, and is not compared.
    """
    asked = json.loads(json.dumps(asked))
    for name, value in asked.items():
        if made.get(name, value) != value:
            raise SystemExit(f"{what} has {name} {made[name]}, not {value}: {remedy}.")
