"""Checkpoints of a training run: what it takes to go on as if it had not been interrupted."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memvec.errors import MemvecError
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.writing import write_atomically


def model_of(lm: FrozenLM) -> dict[str, Any]:
    """What a run keeps of the model beside which it trains."""
    return {**asdict(lm.fingerprint), "quantize": lm.quantize}


def save_checkpoint(
    partial: Path,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Sequence[float | int],
) -> None:
    """Write a run's state beside its file, whole or not at all.

    `identity` is what the run depends on (text, settings, and as `model` what `model_of` says),
    `progress` its own counters.
    """
    state = {
        "identity": identity,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": list(progress),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(partial, buffer.getvalue())


def load_checkpoint(
    partial: Path,
    identity: dict[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list[float | int]:
    """Put the state of a checkpoint back; returns its `progress`.

    Raises MemvecError for a file that cannot be read, or one of a run with another identity.
    """
    try:
        state: dict[str, Any] = torch.load(partial, weights_only=True, map_location="cpu")
        same = _alike(state["identity"], identity)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError):
        raise MemvecError(f"{partial} cannot be read: delete it to start over.") from None
    if not same:
        raise MemvecError(
            f"{partial} is of a run with another model, text or settings: delete it to start over."
        )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    progress: list[float | int] = state["progress"]
    return progress


def _alike(found: dict[str, Any], identity: dict[str, Any]) -> bool:
    """True if both are of one run. Probe logits of one model differ a little between kernels."""
    if {**found, "model": None} != {**identity, "model": None}:
        return False
    theirs, own = found["model"], identity["model"]
    same = [theirs[name] == own[name] for name in ("dtype", "quantize")]
    return all(same) and Fingerprint.of_record(theirs).matches(Fingerprint.of_record(own))
