"""The files that a recipe names, by their hashes: a name does not identify what a file contains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from memvec import plugins, registry
from memvec.companions.triggers import trigger_file
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import continues
from memvec.vectors_file import existing_path
from memvec.writing import path_of


def named_files(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files that a recipe names: its questions, trigger, neighbours and start.

    A name does not identify a file whose contents changed since. Raises MemvecError if
    the file of neighbours or of the start is not there.
    """
    path = trigger_file(recipe.trigger)
    named = {} if path is None else {"trigger": path}
    if recipe.term == "use" and plugins.plain(recipe.queries) not in registry.names("queries"):
        named["questions"] = path_of(recipe.queries)
    if recipe.neighbours != "none":
        named["neighbours"] = existing_path(recipe.neighbours)
    if continues(recipe) and (file := plugins.split(recipe.start)[1].get("file")):
        named["start"] = existing_path(file)
    return hashes_of(named)


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each of these files, without those that are not there."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.is_file()
    }
