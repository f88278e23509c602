"""Exports of vectors for other software; targets are registered under the kind "export".

Your own target is one class in your own package; `memvec export --to mine` then uses it:

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
    """The names of all export targets, those of memvec first."""
    return registry.names("export")


def target(name: str) -> Target:
    """The target with a name. Raises MemvecError, with the nearest known name, for others."""
    if name not in names():
        raise MemvecError(f"unknown target '{name}': {did_you_mean(name, names())}")
    kind = registry.get("export", name)
    if not (isinstance(kind, type) and issubclass(kind, Target)):
        raise MemvecError(f"the export '{name}' is no class derived from memvec.export.Target.")
    if lacking := [word for word in ("description", "suffix") if not hasattr(kind, word)]:
        raise MemvecError(f"the export '{name}' has no {' and no '.join(lacking)}.")
    return kind(name)
