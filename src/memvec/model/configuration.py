"""Facts from a model's configuration: its context length, and the token that starts a text."""

from __future__ import annotations

from typing import Any


def context_length(config: Any) -> int | None:
    """Longest input, in positions; None for models without a limit (Mamba)."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        length = getattr(config, key, None)
        if isinstance(length, int) and 0 < length < 10**9:
            return length
    return None


def start_token(config: Any, tokenizer: Any, rows: int) -> int | None:
    """The id of the token that starts a text: BOS, else EOS, which separates documents.

    `rows` is the number of rows of the embedding matrix. None if no id lies below it.
    """
    candidates = [
        getattr(tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ]
    for token in candidates:
        if isinstance(token, list):
            token = token[0] if token else None
        if isinstance(token, int) and 0 <= token < rows:
            return token
    return None
