"""Checkpoints of a training run, from which it continues as if it had not been interrupted."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from memvec.companions.encoder_files import READING_ERRORS
from memvec.errors import MemvecError
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.writing import write_atomically

DIGEST = hashlib.sha256().digest_size  # bytes before the data of torch.save


def model_of(lm: FrozenLM) -> dict[str, Any]:
    """The entry for the frozen LM in the identity of a run."""
    return {**asdict(lm.fingerprint), "quantize": lm.quantize}


def save_checkpoint(
    partial: Path,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Sequence[float | int],
) -> None:
    """Write a run's state to `partial`, atomically.

    `identity` holds all that the run depends on (text, settings, and as `model` the result of
    `model_of`), `progress` its counters.
    """
    state = {
        "identity": identity,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": list(progress),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_atomically(partial, hashlib.sha256(data).digest() + data)


def load_checkpoint(
    partial: Path,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list[float | int]:
    """Load a checkpoint into `network` and `optimizer`; returns its `progress`.

    Raises MemvecError if the file cannot be read, was changed, or belongs to a run with another
    identity.
    """
    try:
        digest, data = (whole := partial.read_bytes())[:DIGEST], whole[DIGEST:]
    except OSError as error:
        raise MemvecError(f"{partial} cannot be read ({error.strerror}): delete it.") from None
    if hashlib.sha256(data).digest() != digest:
        raise MemvecError(f"{partial} is damaged: delete it to start over.")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        same_run = _alike(state["identity"], identity)
        if not same_run:
            raise MemvecError(
                f"{partial} is of a run with another model, text or settings: delete it to start "
                "over."
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        progress: list[float | int] = state["progress"]
        return progress
    except (*READING_ERRORS, RuntimeError, EOFError, UnpicklingError):
        raise MemvecError(f"{partial} is damaged: delete it to start over.") from None


def _alike(stored: dict[str, Any], identity: dict[str, Any]) -> bool:
    """True if both identify the same run; probe logits are compared with a tolerance."""
    if {**stored, "model": None} != {**identity, "model": None}:
        return False
    stored_model, model = stored["model"], identity["model"]
    same = [stored_model[name] == model[name] for name in ("dtype", "quantize")]
    return all(same) and Fingerprint.of_record(stored_model).matches(Fingerprint.of_record(model))
