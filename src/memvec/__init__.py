"""memvec crams text into a few input vectors of a frozen language model and gets it back exactly.

The public catalogue; everything else is reachable by its module. Nothing heavy is imported until a
name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memvec.codec import cram, decode, measure, verify
    from memvec.cramming.engine import Engine
    from memvec.cramming.recipe import Recipe
    from memvec.errors import MemvecError, NotExactError
    from memvec.loading import load_lm
    from memvec.model.lm import FrozenLM
    from memvec.registry import register
    from memvec.usable.certificate import certify_use
    from memvec.usable.generate import use
    from memvec.vectors import MemVectors

_WHERE = {
    "load_lm": "memvec.loading",
    "FrozenLM": "memvec.model.lm",
    "cram": "memvec.codec",
    "decode": "memvec.codec",
    "MemVectors": "memvec.vectors",
    "measure": "memvec.codec",
    "verify": "memvec.codec",
    "use": "memvec.usable.generate",
    "certify_use": "memvec.usable.certificate",
    "register": "memvec.registry",
    "Engine": "memvec.cramming.engine",
    "Recipe": "memvec.cramming.recipe",
    "MemvecError": "memvec.errors",
    "NotExactError": "memvec.errors",
}

__all__ = [
    "Engine",
    "FrozenLM",
    "MemVectors",
    "MemvecError",
    "NotExactError",
    "Recipe",
    "certify_use",
    "cram",
    "decode",
    "load_lm",
    "measure",
    "register",
    "use",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'memvec' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
