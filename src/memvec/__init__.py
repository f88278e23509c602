"""memvec crams text into a few input vectors of a frozen language model and gets it back exactly.

This module exports the public API. Import other names from their modules. The first use of a name
imports its module, so `import memvec` does not load torch.

Letters in shapes: B slots in the batch, K [mem] vectors, T tokens of a passage, D width of an input
vector, W numbers of a vector in another space, H width of a hidden state, V vocabulary, N inputs of
a forward pass, F of them in front of the vectors, L layers, P passages of a file. docs/concepts.md
defines the terms.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # `name as name` marks a re-export for type checkers
    from memvec.certificate import certify as certify
    from memvec.certificate import measure as measure
    from memvec.certificate import verify as verify
    from memvec.codec import cram as cram
    from memvec.codec import decode as decode
    from memvec.cramming.engine import Engine as Engine
    from memvec.cramming.recipe import Recipe as Recipe
    from memvec.errors import MemvecError as MemvecError
    from memvec.errors import NotExactError as NotExactError
    from memvec.loading import load_lm as load_lm
    from memvec.model.lm import FrozenLM as FrozenLM
    from memvec.registry import register as register
    from memvec.usable.certificate import certify_use as certify_use
    from memvec.usable.generate import context_inputs as context_inputs
    from memvec.usable.generate import use as use
    from memvec.usable.score import score as score
    from memvec.vectors import MemVectors as MemVectors

_NAMES = {  # module -> the public names that it defines
    "memvec.certificate": ("certify", "measure", "verify"),
    "memvec.codec": ("cram", "decode"),
    "memvec.cramming.engine": ("Engine",),
    "memvec.cramming.recipe": ("Recipe",),
    "memvec.errors": ("MemvecError", "NotExactError"),
    "memvec.loading": ("load_lm",),
    "memvec.model.lm": ("FrozenLM",),
    "memvec.registry": ("register",),
    "memvec.usable.certificate": ("certify_use",),
    "memvec.usable.generate": ("context_inputs", "use"),
    "memvec.usable.score": ("score",),
    "memvec.vectors": ("MemVectors",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'memvec' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
