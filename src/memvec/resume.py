"""Crash-safe cramming: open the journal of a run, under the settings that decide its vectors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from memvec import __version__
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.journal import Journal
from memvec.model.lm import FrozenLM
from memvec.usable.recipe_files import named_files
from memvec.writing import path_of

SQLITE_MAGIC = b"SQLite format 3\0"  # first bytes of an SQLite file


def settings_of(
    lm: FrozenLM, recipe: Recipe, *, vectors: int, storage: str, layout: str
) -> dict[str, Any]:
    """The settings that decide a passage's vectors; a run continues only under the same settings.

    Raises MemvecError as `named_files` does.
    """
    return {
        "model": lm.description(),
        "recipe": recipe.record(),
        "vectors": vectors,
        "layout": layout,
        "storage": storage,
        "version": __version__,
        **named_files(recipe),
    }


@contextlib.contextmanager
def opened(
    journal: Journal | str | os.PathLike[str] | None, lm: FrozenLM, recipe: Recipe, **sizes: Any
) -> Iterator[Journal | None]:
    """Context manager: opens the journal at a path; yields a Journal, or None, unchanged.

    `sizes` are the keyword arguments of `settings_of`. Raises MemvecError as `Journal` does, for a
    `journal` of another type, for a missing folder, and for a file that is no journal.
    """
    if journal is None or isinstance(journal, Journal):
        yield journal
        return
    if not isinstance(journal, str | os.PathLike):
        raise MemvecError(f"journal is the path of a file, or a Journal, not {journal!r:.60}.")
    path = path_of(journal)
    if not path.parent.is_dir():
        raise MemvecError(f"there is no folder {path.parent} to keep {path.name} in.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(SQLITE_MAGIC)) not in (SQLITE_MAGIC, b""):
                raise MemvecError(f"{path} is no file of finished passages: name another one.")
    kept = Journal(path, settings_of(lm, recipe, **sizes))
    try:
        yield kept
    finally:
        kept.close(delete=False)
