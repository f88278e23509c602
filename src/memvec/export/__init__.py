"""Exports of vectors for other software; targets are registered under the kind "export".

Your own target is one class in your own package; `memvec export --to mine` then uses it:

    @register("export", "mine")
    class Mine(Target): ...
"""

from __future__ import annotations

from memvec import registry
from memvec.export.context import export_context
from memvec.export.folder import export
from memvec.export.target import Target
from memvec.export.target import target_of as target

__all__ = ["Target", "export", "export_context", "names", "target"]


def names() -> list[str]:
    """The names of all export targets, those of memvec first."""
    return registry.names("export")
