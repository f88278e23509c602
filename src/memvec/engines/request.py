"""The request to an engine: a folder that the engine's own Python reads (runners/asked.py)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memvec.errors import MemvecError


@dataclass(frozen=True)
class Prompt:
    """What an engine reads, and how many tokens it writes after it, greedily.

    `vectors` (K, D), in the model's dtype; `tokens` after them, and `embedded` (n, D), the
    embeddings of those as the model sees them, for engines that take all inputs as vectors. A plain
    prompt has `vectors` None: its tokens stand alone. `text` is the text of the tokens, for an
    engine that is asked with text.
    """

    vectors: Float[Tensor, "K D"] | None
    tokens: Sequence[int]
    new_tokens: int
    embedded: Float[Tensor, "n D"] | None = None
    text: str | None = None


def write_request(
    folder: Path,
    model: str | os.PathLike[str],
    dtype: str,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int]],
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write `request.json`, and a NumPy file (N, D) of each prompt with vectors, with its hash.

    `batches` are indices into the prompts: those of a batch are given to the engine together.
    Raises MemvecError for prompts of different widths, numbers that are not finite, or no prompt.
    """
    if not any(batches) or not prompts:
        raise MemvecError("there is no prompt to ask an engine for.")
    widths = sorted({p.vectors.shape[1] for p in prompts if p.vectors is not None})
    if len(widths) > 1:
        raise MemvecError(f"the vectors of one request have {widths} numbers each, not one width.")
    request = {
        "model": os.fspath(model),
        "dtype": dtype,
        "width": widths[0] if widths else None,
        "settings": dict(settings or {}),
        "batches": [list(batch) for batch in batches],
        "prompts": [_written(folder, i, prompt) for i, prompt in enumerate(prompts)],
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def _written(folder: Path, i: int, prompt: Prompt) -> dict[str, Any]:
    """The entry of one prompt; its file is written."""
    entry = {"tokens": list(prompt.tokens), "new_tokens": prompt.new_tokens, "text": prompt.text}
    if prompt.vectors is None:
        return {**entry, "file": None}
    parts = [prompt.vectors] if prompt.embedded is None else [prompt.vectors, prompt.embedded]
    inputs = torch.cat(parts).float()
    if not bool(torch.isfinite(inputs).all()):
        raise MemvecError(f"the vectors of prompt {i} have numbers that are not finite.")
    path = folder / f"prompt-{i:04}.npy"
    np.save(path, inputs.numpy(), allow_pickle=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**entry, "file": path.name, "sha256": digest}
