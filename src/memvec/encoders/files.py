"""Encoder files: one safetensors file, `encoder.safetensors` in a model's folder or anywhere else.

Its metadata say which kind it is, what shape it has, how many leading tokens per vector are worth
encoding, and, for encoders trained beside a frozen LM, which LM that was.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memvec.encoders.base import OnePassEncoder
from memvec.encoders.slots import SlotEncoder, SlotNetwork
from memvec.encoders.summary import SummaryEncoder
from memvec.errors import MemvecError
from memvec.model.fingerprint import Fingerprint
from memvec.writing import write_atomically

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LARGEST = {"hidden": 16_384, "layers": 256, "heads": 512, "slots": 4096}


def load_encoder(path: Path, lm: FrozenLM) -> OnePassEncoder:
    """The encoder in a file, on the model's device.

    Raises MemvecError if the file is no encoder, was made for another model, or does not hold what
    it says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MemvecError(f"{path} is not an encoder that memvec can read: {error}") from error
    try:
        model = json.loads(metadata.get("model", "null"))
        made_for = model and Fingerprint(
            model["config"], model["weights"], tuple(map(float, model["probe"])), model["dtype"]
        )
        tokens = int(metadata.get("tokens", 0))
        if metadata.get("kind", "summary") == "slots":
            shape = {name: int(json.loads(metadata["shape"])[name]) for name in LARGEST}
        else:
            shape = {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MemvecError(f"{path} is not an encoder that memvec can read: {error!r}") from None
    if made_for and not made_for.matches(lm.fingerprint):
        raise MemvecError(
            f"{path} was trained for other weights (of {model.get('name')}) than those of "
            f"{lm.name}: train one for this model with memvec encoder train."
        )
    encoder: OnePassEncoder = (
        _slots(path, tensors, shape, lm) if shape else _summary(path, tensors, lm)
    )
    encoder = encoder.to(lm.device, lm.dtype)
    encoder.tokens = tokens
    encoder.identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return encoder


def save_encoder(
    path: Path, encoder: SlotEncoder, lm: FrozenLM, about: dict[str, Any] | None = None
) -> None:
    """Write an encoder trained beside a frozen LM; atomically, so that no half of one is left."""
    metadata = {
        "format": "memvec-encoder",
        "version": "1",
        "kind": "slots",
        "shape": json.dumps(encoder.settings()),
        "tokens": str(encoder.tokens),
        "max_vectors": str(encoder.max_vectors),
        "model": json.dumps({"name": lm.name, **asdict(lm.fingerprint)}),
        "about": json.dumps(about or {}),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.network.state_dict().items()}
    write_atomically(path, save(tensors, metadata))


def _summary(path: Path, tensors: dict[str, Tensor], lm: FrozenLM) -> SummaryEncoder:
    missing = {"summary", "map.weight", "map.bias"} - tensors.keys()
    if missing:
        raise MemvecError(f"{path} is not an encoder that memvec can read: no {min(missing)}.")
    summary, weight, bias = (tensors[key] for key in ("summary", "map.weight", "map.bias"))
    summary, D = summary.reshape(-1, summary.shape[-1]), lm.width
    if summary.shape[1] != D or weight.shape != (D, D) or bias.shape != (D,):
        raise MemvecError(f"{path} was made for another model: its width is not {D}.")
    return SummaryEncoder(summary, weight, bias)


def _slots(
    path: Path, tensors: dict[str, Tensor], shape: dict[str, int], lm: FrozenLM
) -> SlotEncoder:
    for name, largest in LARGEST.items():
        if not 1 <= shape[name] <= largest:
            raise MemvecError(f"{path} claims {shape[name]} {name}: not an encoder of memvec's.")
    claimed = shape["layers"] * 12 * shape["hidden"] ** 2
    if claimed > 2 * sum(t.numel() for t in tensors.values()) + 1024:
        raise MemvecError(f"{path} claims more than it holds: the file is damaged.")
    try:
        network = SlotNetwork(lm.width, **shape)
        network.load_state_dict({k: v.float() for k, v in tensors.items()})
    except (RuntimeError, ValueError, AssertionError):
        raise MemvecError(
            f"{path} does not fit {lm.name} (D {lm.width}): it was made for another model."
        ) from None
    return SlotEncoder(network)
