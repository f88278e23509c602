"""Hashes of the files that a recipe names, since a name does not identify a file's contents."""

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
    """SHA-256 of the files that a recipe names: questions, trigger, neighbours and start.

    Raises MemvecError if the file of neighbours or of the start does not exist.
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
    """SHA-256 (hex) of each file that exists, by name."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.is_file()
    }
