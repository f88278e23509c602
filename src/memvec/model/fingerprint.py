"""What identifies a model's weights: vectors decode with the model they were made for, only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Saving and loading a model writes these; they say nothing about its weights.
VOLATILE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a model's weights, whatever dtype they are loaded in.

    `config` is the SHA-256 of the configuration, `weights` that of the embedding matrix rounded to
    bfloat16; `probe` holds a few logits of a fixed prompt, compared with a tolerance because
    kernels differ.
    """

    config: str
    weights: str
    probe: tuple[float, ...]
    dtype: str

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint in a record of a model. KeyError, TypeError or ValueError: none."""
        probe = tuple(map(float, record["probe"]))
        return cls(record["config"], record["weights"], probe, record["dtype"])

    def matches(self, other: Fingerprint) -> bool:
        """True if both come from the same model (probe logits within 2 % of their size + 0.1).

        Numbers that went through float16 round to other bfloat16s, so there the probe decides.
        """
        return (
            self.config == other.config
            and (self.weights == other.weights or "float16" in (self.dtype, other.dtype))
            and len(self.probe) == len(other.probe)
            and all(
                abs(a - b) <= 0.1 + 0.02 * abs(a)
                for a, b in zip(self.probe, other.probe, strict=True)
            )
        )


def _lasting(settings: Any) -> Any:
    """Settings without those that say nothing about the weights, in nested configurations too."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _lasting(value) for name, value in settings.items() if name not in VOLATILE}


def fingerprint_of(
    config: Any,
    embedding: Float[Tensor, "V D"],
    logits: Float[Tensor, " V"],
    dtype: str | None = None,
) -> Fingerprint:
    """The fingerprint of a model with this configuration, embedding matrix and probe logits.

    `dtype`: what it is computed in, if that is not the dtype of the matrix.
    """
    described = json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode()
    rounded = embedding.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    probe = logits[:: max(1, len(logits) // 8)][:8]
    return Fingerprint(
        hashlib.sha256(described).hexdigest(),
        hashlib.sha256(rounded).hexdigest(),
        tuple(round(float(x), 3) for x in probe),
        dtype or str(embedding.dtype).removeprefix("torch."),
    )
