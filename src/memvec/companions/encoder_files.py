"""Encoder files: one safetensors file each, in a model's folder or elsewhere.

The metadata contain its kind (registered in `memvec.registry` with the function that reads it), how
many leading tokens per vector to encode, and, for encoders trained with a frozen LM, that LM. Your
own kind is a function in your own package:

    @register("encoder", "mine")
    def read(file: EncoderFile, lm: FrozenLM) -> OnePassEncoder: ...

It raises MemvecError for tensors that do not fit the model, and ValueError, KeyError, TypeError or
AttributeError for metadata that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from memvec import plugins, registry
from memvec.companions.encoder import EncoderFile, OnePassEncoder, TrainedEncoder
from memvec.errors import MemvecError
from memvec.machine import environment
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.writing import copied_tensors, path_of, read_json, write_atomically

# Files in a model's folder: the encoder that was trained together with the model, a better one that
# was trained later for the frozen model, and the encoder of usable vectors.
FILE_NAME = "encoder.safetensors"
ADAPTED_FILE_NAME = "adapted-encoder.safetensors"
USABLE_FILE_NAME = "usable-encoder.safetensors"

# Errors that reading metadata, or tensors of unexpected shapes, may raise.
READING_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def read_encoders(lm: FrozenLM, folder: Path | None, file: str | os.PathLike[str] | None) -> None:
    """Set the encoders of a model from its folder; the encoder in `file` replaces one of its kind.

    A quantized model gets none from its folder, because they were trained for other weights. Raises
    MemvecError as `load_encoder` does.
    """
    folder = None if lm.quantize else folder
    for name in (FILE_NAME, ADAPTED_FILE_NAME):  # the second keeps the first in `own`
        if folder is not None and (path := folder / name).is_file():
            lm.encoder = load_encoder(path, lm)
    if folder is not None and (path := folder / USABLE_FILE_NAME).is_file():
        lm.usable_encoder = load_encoder(path, lm)
    if file is not None:
        encoder = load_encoder(file, lm)
        if encoder.for_use:
            lm.usable_encoder = encoder
        else:
            lm.encoder = encoder


def load_encoder(path: str | os.PathLike[str], lm: FrozenLM) -> OnePassEncoder:
    """The encoder in a file, on the model's device.

    Raises MemvecError if the file is no encoder, is of an unknown kind, was made for another model,
    or is damaged.
    """
    path = path_of(path)
    file = _open(path)
    kind = file.metadata.get("kind", "summary")
    if kind not in registry.names("encoder"):
        hint = plugins.known(kind, registry.names("encoder"))
        raise MemvecError(f"{path} has an encoder of the unknown kind '{kind}': {hint}")
    try:
        tokens = int(file.metadata.get("tokens", 0))
        _check_model(file, lm)
        encoder: OnePassEncoder = registry.get("encoder", kind)(file, lm)
        if tokens < 0 or encoder.max_vectors < 1:
            raise ValueError(f"{tokens} tokens for each of {encoder.max_vectors} vectors")
    except READING_ERRORS as error:
        raise MemvecError(f"{path} is not an encoder that memvec can read: {error!r}") from None
    encoder = encoder.to(lm.device, lm.dtype)
    encoder.tokens, encoder.file = tokens, path
    encoder.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return encoder


def save_encoder(
    path: str | os.PathLike[str],
    encoder: TrainedEncoder,
    lm: FrozenLM,
    about: dict[str, Any] | None = None,
) -> None:
    """Write an encoder trained with a frozen LM to a file, atomically.

    `about` is stored in the metadata.
    """
    metadata = {
        "format": "memvec-encoder",
        "version": "1",
        "kind": encoder.kind,
        "shape": json.dumps(encoder.settings()),
        "tokens": str(encoder.tokens),
        "max_vectors": str(encoder.max_vectors),
        "model": json.dumps({"name": lm.name, **asdict(lm.fingerprint)}),
        "about": json.dumps(about or {}),
        "environment": json.dumps(environment(lm.device) | {"device": lm.device.type}),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.network.state_dict().items()}
    write_atomically(path_of(path), save(tensors, metadata))


def shape_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The shape of a trained encoder from its file alone; empty for a kind without one.

    Raises MemvecError if the file is no encoder.
    """
    try:
        shape = read_json(_open(path_of(path)).metadata.get("shape", "{}"))
    except ValueError as error:
        raise MemvecError(f"{path} is not an encoder that memvec can read: {error}.") from None
    return shape if isinstance(shape, dict) else {}


def _open(path: Path) -> EncoderFile:
    if not path.is_file():
        raise MemvecError(f"there is no encoder {path}: train one with memvec encoder train.")
    try:
        with safe_open(path, framework="pt") as file:
            return EncoderFile(path, copied_tensors(file, file.keys()), file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise MemvecError(f"{path} is not an encoder that memvec can read: {error}.") from error


def _check_model(file: EncoderFile, lm: FrozenLM) -> None:
    """Raise MemvecError if the file names another model than this one."""
    model = json.loads(file.metadata.get("model", "null"))
    if not model:
        return
    if not Fingerprint.of_record(model).matches(lm.fingerprint):
        raise MemvecError(
            f"{file.path} was trained for other weights (of {model.get('name')}) than those of "
            f"{lm.name}: train one for this model with memvec encoder train."
        )
