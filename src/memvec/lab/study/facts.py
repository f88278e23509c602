"""Config facts of known models, so that a spec can be checked and priced without weights.

From the models' published config.json files; parameters as published with the weights. The
built-in model, and any other folder, is read from its own config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError


@dataclass(frozen=True)
class Facts:
    """What pricing and context checks need to know about a model."""

    width: int  # D, numbers of an input vector
    vocabulary: int  # V
    layers: int
    hidden: int
    parameters: float
    context: int | None  # tokens; None: no limit


def known_facts() -> dict[str, Facts]:
    """Facts shipped with the package, by Hub id."""
    data = json.loads(files("memvec.lab.study").joinpath("facts.json").read_text("utf-8"))
    return {name: Facts(**facts) for name, facts in data["models"].items()}


def facts_of(name: str) -> Facts | None:
    """Facts of a model by Hub id, folder or 'pocket'; None if nothing is known here.

    Raises MemvecError for a folder whose config cannot be read.
    """
    known = known_facts()
    if name in known:
        return known[name]
    from memvec.loading import POCKET

    folder = POCKET if name == "pocket" else Path(name).expanduser()
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        return _facts_in(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, or not such a config
        raise MemvecError(f"{file} is not a model's config: {error}.") from None


def _facts_in(config: dict[str, Any]) -> Facts:
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    vocabulary = int(config.get("vocab_size", 0))
    inner = int(config.get("intermediate_size") or 4 * hidden)
    parameters = vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * inner)
    context = config.get("max_position_embeddings") or config.get("n_positions")
    width = int(config.get("word_embed_proj_dim") or hidden)
    return Facts(width, vocabulary, layers, hidden, float(parameters), context)
