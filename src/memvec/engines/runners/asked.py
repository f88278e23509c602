"""What every runner shares: a request, read and checked before the engine is imported."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np


class RequestError(Exception):
    """A request that no engine should see, in one sentence."""


@dataclass(frozen=True)
class Prompt:
    """What the engine reads of one request, and how many tokens it writes after it.

    `inputs` (N, D) float32 are the first `vectors` rows, [mem] vectors, and the embeddings of
    `tokens` after them; None for a plain prompt, which is its `tokens` alone. `text` is the text
    of the tokens, for an engine that is asked with text.
    """

    inputs: Any
    vectors: int
    tokens: list[int]
    new_tokens: int
    text: str | None = None

    @property
    def length(self) -> int:
        """Its inputs and the new tokens after them."""
        return self.vectors + len(self.tokens) + self.new_tokens


def release_of(*distributions: str) -> str:
    """Name and release of the first of these that is installed: builds have names of their own."""
    for name in distributions:
        try:
            return f"{name} {installed(name)}"
        except PackageNotFoundError:
            continue
    return distributions[-1]


def window(model: str, tokens: int) -> int:
    """So many tokens, or as many as the model in a folder reads if these are fewer."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    named = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits: list[int] = [config[name] for name in named if config.get(name)]
    return min([tokens, *limits])


def read(folder: Path) -> tuple[dict[str, Any], list[Prompt]]:
    """The request and its prompts. Raises RequestError if anything of it is damaged."""
    try:
        request: dict[str, Any] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        prompts = [prompt_of(folder, entry, request["width"]) for entry in request["prompts"]]
        batches = [i for batch in request["batches"] for i in batch]
        request["model"], request["dtype"], request["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(f"{folder} holds no whole request.json: write it again.") from None
    if not all(0 <= i < len(prompts) for i in batches):
        raise RequestError("a batch of the request names a prompt that is not there.")
    return request, prompts


def prompt_of(folder: Path, entry: dict[str, Any], width: int) -> Prompt:
    """One prompt. Raises RequestError for a file that is not the one that was written."""
    tokens, new_tokens, text = entry["tokens"], entry["new_tokens"], entry.get("text")
    if entry["file"] is None:
        if not tokens:
            raise RequestError("a prompt of the request has neither vectors nor tokens.")
        return Prompt(None, 0, tokens, new_tokens, text)
    path = folder / entry["file"]
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise RequestError(f"{path.name} of the request is missing, cut short or changed.")
    inputs = np.load(path, allow_pickle=False)
    if inputs.ndim != 2 or not len(inputs) or inputs.shape[1] != width:
        raise RequestError(
            f"{path.name} has the shape {inputs.shape} and the model takes vectors of {width}."
        )
    if not np.isfinite(inputs).all():
        raise RequestError(f"{path.name} has numbers that are not finite.")
    vectors = len(inputs) - len(tokens)
    if vectors < 1:
        raise RequestError(f"{path.name} has {len(inputs)} rows, of which none is a vector.")
    return Prompt(inputs, vectors, tokens, new_tokens, text)
