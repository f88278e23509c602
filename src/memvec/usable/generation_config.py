"""Generate with another generation config than the model's own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from memvec.model.lm import FrozenLM

if TYPE_CHECKING:
    from transformers import GenerationConfig


def generating_by(lm: FrozenLM, config: GenerationConfig) -> Any:
    """A shallow copy of the model, with the same weights, that has this generation config.

    `generate` fills in what its caller does not pass from the model's own config. Threads may
    generate with one model at the same time, so the config of the model itself is not replaced.
    """
    model: Any = copy.copy(lm.model)
    model.generation_config = config
    return model
