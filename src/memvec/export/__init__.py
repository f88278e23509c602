"""Exports of vectors for other software; `memvec.registry` lists targets under the kind "export".

A target of your own is one class in your own package: `memvec export --to mine` then writes it.

    @register("export", "mine")
    class Mine(Target): ...
"""

from __future__ import annotations

from memvec import registry
from memvec.errors import MemvecError, did_you_mean
from memvec.export.context import export_context
from memvec.export.folder import export
from memvec.export.target import Target

__all__ = ["Target", "export", "export_context", "names", "target"]


def names() -> list[str]:
    """Every export target's name, the project's own first."""
    return registry.names("export")


def target(name: str) -> Target:
    """The target of a name. Raises MemvecError, with the nearest known name, if it is unknown."""
    if name not in names():
        raise MemvecError(f"unknown target '{name}': {did_you_mean(name, names())}")
    made: Target = registry.get("export", name)(name)
    return made
