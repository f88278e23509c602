"""memvec crams text into a few input vectors of a frozen language model and gets it back exactly.

The public catalogue; everything else is reachable by its module. Nothing heavy is imported until a
name is used.

Letters in shapes: B slots in the batch, K [mem] vectors, T tokens of a passage, D width of an input
vector, H width of a hidden state, V vocabulary, N inputs of a forward pass, L layers, P passages of
a file. docs/concepts.md defines the terms.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # a name 'as' itself is one that this package gives on
    from memvec.certification import certify as certify
    from memvec.codec import cram as cram
    from memvec.codec import decode as decode
    from memvec.codec import measure as measure
    from memvec.codec import verify as verify
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

_WHERE = {
    "load_lm": "memvec.loading",
    "FrozenLM": "memvec.model.lm",
    "cram": "memvec.codec",
    "decode": "memvec.codec",
    "MemVectors": "memvec.vectors",
    "measure": "memvec.codec",
    "verify": "memvec.codec",
    "certify": "memvec.certification",
    "use": "memvec.usable.generate",
    "context_inputs": "memvec.usable.generate",
    "score": "memvec.usable.score",
    "certify_use": "memvec.usable.certificate",
    "register": "memvec.registry",
    "Engine": "memvec.cramming.engine",
    "Recipe": "memvec.cramming.recipe",
    "MemvecError": "memvec.errors",
    "NotExactError": "memvec.errors",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'memvec' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
