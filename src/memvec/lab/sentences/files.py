"""Files of latent models: safetensors; the metadata say which LM and encoder it is for."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memvec.companions.encoder import claims_too_much
from memvec.errors import MemvecError
from memvec.lab.sentences.latents import need_encoder
from memvec.lab.sentences.model import LatentModel, LatentNetwork
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.writing import copied_tensors, path_of, read_json, write_atomically

FORMAT = "memvec-sentences"
MAX_SIZES = {"hidden": 16_384, "layers": 256, "heads": 512}  # of the shape in a file
MAX_VECTORS = 4096


def save_latent_model(path: str | os.PathLike[str], model: LatentModel, lm: FrozenLM) -> None:
    """Write a latent model trained beside a frozen LM, atomically: never half a file.

    Raises MemvecError for an LM without an encoder, or a file that cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "version": "1",
        "shape": json.dumps(model.network.shape),
        "vectors": str(model.vectors),
        "max_tokens": str(model.max_tokens),
        "window": str(model.window),
        "model": json.dumps({"name": lm.name, **asdict(lm.fingerprint)}),
        "encoder": need_encoder(lm).identity,
        "about": json.dumps(model.about),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.network.state_dict().items()}
    write_atomically(path_of(path), save(tensors, metadata))


def load_latent_model(path: str | os.PathLike[str], lm: FrozenLM) -> LatentModel:
    """The latent model in a file, on the LM's device.

    Raises MemvecError if there is no such file, it is no latent model, is damaged, or was trained
    beside another LM or another encoder.
    """
    path = path_of(path)
    tensors, metadata = _open(path)
    try:
        _check_model(path, metadata, lm)
        shape = {key: int(read_json(metadata["shape"])[key]) for key in MAX_SIZES}
        if any(not 1 <= size <= MAX_SIZES[key] for key, size in shape.items()):
            raise ValueError(f"a shape of {shape}")
        K, max_tokens, window = (int(metadata[k]) for k in ("vectors", "max_tokens", "window"))
        if min(K, max_tokens, window) < 1 or K > MAX_VECTORS:
            raise ValueError(f"{K} vectors, {max_tokens} tokens, {window} sentences")
        claimed = shape["hidden"] * (12 * shape["layers"] * shape["hidden"] + 2 * K * lm.width)
        if claims_too_much(claimed, tensors):
            raise ValueError("it claims more than it holds")
        network = LatentNetwork(K * lm.width, **shape)
        network.load_state_dict(tensors)
        about = read_json(metadata["about"])
    except KeyError as error:
        raise _unreadable(path, f"it does not say its {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise _unreadable(path, str(error)) from None
    network = network.to(lm.device).eval().requires_grad_(False)
    identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return LatentModel(network, K, max_tokens, window, about, identity)


def model_of(path: str | os.PathLike[str]) -> str:
    """The name of the LM that a latent model was trained beside.

    Raises MemvecError if there is no such file, or it is no latent model or damaged.
    """
    path = path_of(path)
    _, metadata = _open(path)
    try:
        return str(read_json(metadata["model"])["name"])
    except (ValueError, KeyError, TypeError):
        raise _unreadable(path, "it does not say its model") from None


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise MemvecError(
            f"there is no latent model {path}: make one with memvec lab sentences train."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = copied_tensors(file, file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, str(error)) from None
    if metadata.get("format") != FORMAT:
        raise MemvecError(
            f"{path} is no latent model of sentences: make one with memvec lab sentences train."
        )
    return tensors, metadata


def _unreadable(path: Path, reason: str) -> MemvecError:
    reason = reason.rstrip(".")
    return MemvecError(f"{path} is not a latent model that memvec can read: {reason}.")


def _check_model(path: Path, metadata: dict[str, str], lm: FrozenLM) -> None:
    """Raise MemvecError if the file was made for another LM or another encoder."""
    record: dict[str, Any] = read_json(metadata["model"])
    if not Fingerprint.of_record(record).matches(lm.fingerprint):
        raise MemvecError(
            f"{path} was trained beside other weights (of {record.get('name')}) than those of "
            f"{lm.name}: train one for this model with memvec lab sentences train."
        )
    if need_encoder(lm).identity != metadata["encoder"]:
        raise MemvecError(
            f"{path} was trained on the latents of another encoder than {lm.name} has now: load "
            "that one with encoder=FILE, or train anew."
        )
