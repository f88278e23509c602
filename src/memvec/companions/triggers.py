"""Triggers by name: BOS, another token, or the file of a crammed one (docs/usable.md).

The file is in the safetensors format: `trigger` (R, D), `front` (P, D) if there are soft tokens in
front of the vectors, and metadata about the training and the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from memvec.companions.around import MADE_BY, CrammedTrigger
from memvec.errors import MemvecError
from memvec.machine import environment
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.writing import copied_tensors, path_of, read_json, write_atomically

FILE_NAME = "trigger.safetensors"  # in a model's folder


def token_named(lm: FrozenLM, name: str) -> int:
    """The id of a token that is given as its text, or as '#' and its number.

    Raises MemvecError if the text is not one token.
    """
    if name.startswith("#") and name[1:].isdecimal():
        return int(name[1:])
    ids = lm.tokenize(name)
    if len(ids) != 1:
        raise MemvecError(
            f"'{name}' is {len(ids)} tokens of {lm.name} and a trigger is one: give another, "
            f"its number as '#17', or a file of {MADE_BY}."
        )
    return ids[0]


def trigger_named(lm: FrozenLM, name: str) -> int | CrammedTrigger | None:
    """The trigger of a recipe by name: 'bos' (None), 'auto', a token, or a file of soft tokens.

    'auto' is the crammed trigger in the model's folder, if there is one and vectors are inputs
    (it was trained after inputs), else BOS. Raises MemvecError for a text that is not one token,
    and for a file that is no trigger of this model.
    """
    if name == "auto":
        return lm.own_trigger if lm.reading.space == "inputs" else None
    if name == "bos":
        return None
    path = trigger_file(name)
    return token_named(lm, name) if path is None else load_trigger(path, lm)


def trigger_file(name: str) -> Path | None:
    """The path, if the name of a trigger is that of a file (.safetensors); None for a token."""
    return path_of(name) if Path(name).suffix == ".safetensors" else None


def save_trigger(
    path: str | os.PathLike[str], trigger: CrammedTrigger, lm: FrozenLM, about: dict[str, Any]
) -> None:
    """Write a crammed trigger, atomically; `about` is how it was trained."""
    metadata = {
        "format": "memvec-trigger",
        "version": "1",
        "model": json.dumps({"name": lm.name, **asdict(lm.fingerprint)}),
        "about": json.dumps(about),
        "environment": json.dumps(environment(lm.device) | {"device": lm.device.type}),
    }
    parts = {"trigger": trigger.rows, "front": trigger.front}
    tensors = {
        name: rows.detach().float().cpu().contiguous()
        for name, rows in parts.items()
        if rows is not None
    }
    write_atomically(path_of(path), save(tensors, metadata))


def load_trigger(path: str | os.PathLike[str], lm: FrozenLM) -> CrammedTrigger:
    """The crammed trigger in a file. Raises MemvecError as `stored_trigger` does."""
    return stored_trigger(path, lm)[0]


def stored_trigger(
    path: str | os.PathLike[str], lm: FrozenLM
) -> tuple[CrammedTrigger, dict[str, Any]]:
    """The crammed trigger in a file, and how it was trained.

    Raises MemvecError if there is no such file, or if it is no trigger, is damaged, or was trained
    for other weights than the model's.
    """
    path = path_of(path)
    if not path.is_file():
        raise MemvecError(f"there is no trigger {path}: make one with {MADE_BY}.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            model, about = read_json(facts["model"]), read_json(facts["about"])
            held = copied_tensors(file, file.keys())
        rows, front = held["trigger"], held.get("front")
        made_for = Fingerprint.of_record(model)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MemvecError(
            f"{path} is not a trigger that memvec can read ({error!r}): make one with {MADE_BY}."
        ) from None
    parts = [rows] if front is None else [rows, front]
    shaped = all(part.dim() == 2 and len(part) for part in parts)
    shaped = shaped and parts[0].shape[1] == parts[-1].shape[1]
    if not shaped or not all(bool(torch.isfinite(part).all()) for part in parts):
        raise MemvecError(f"{path} holds no trigger, or one that is not finite: it is damaged.")
    if not made_for.matches(lm.fingerprint):
        raise MemvecError(
            f"{path} was trained for other weights (of {model.get('name')}) than those of "
            f"{lm.name}: train one for this model with {MADE_BY}."
        )
    identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return CrammedTrigger(rows.float(), identity, None if front is None else front.float()), about
