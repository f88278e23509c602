"""Replace the generation config of a model temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from memvec.model.lm import FrozenLM

if TYPE_CHECKING:
    from transformers import GenerationConfig


@contextlib.contextmanager
def generating_by(lm: FrozenLM, config: GenerationConfig) -> Iterator[None]:
    """Context manager that replaces the model's generation config and restores it afterwards."""
    model: Any = lm.model
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous
