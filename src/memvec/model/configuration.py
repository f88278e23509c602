"""Facts of a model's configuration: settings, the context, and the token that starts a text."""

from __future__ import annotations

import itertools
from typing import Any


def setting(config: Any, name: str) -> Any:
    """A value of a transformers configuration; None if it is not set.

    If layers have different values (Gemma 4), transformers raises RuntimeError for the value of the
    whole model; then this is the largest integer of the layers.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
        return max((v for v in values if isinstance(v, int)), default=None)


def context_length(config: Any) -> int | None:
    """The longest input, in positions; None for models without a limit (Mamba)."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        length = setting(config, key)
        if isinstance(length, int) and 0 < length < 10**9:
            return length
    return None


def start_token(config: Any, tokenizer: Any, rows: int) -> int | None:
    """The id of the token that starts a text: BOS, else EOS, which separates documents.

    `rows` is the number of rows of the embedding matrix. None if no id lies below it.
    """
    places = itertools.product(("bos_token_id", "eos_token_id"), (tokenizer, config))
    for name, place in places:
        token = getattr(place, name, None)
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < rows:
            return token
    return None
