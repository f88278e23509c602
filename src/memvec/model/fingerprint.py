"""The fingerprint of a model's weights: vectors decode only with the model they were made for."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.errors import MemvecError, first_line

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

# Settings that change when a model is saved and loaded, and do not depend on its weights.
VOLATILE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, eq=False)  # `matches` compares; hashed by identity as a key of caches
class Fingerprint:
    """Identifies a model's weights, in whatever dtype they are loaded.

    `config` is the SHA-256 of the configuration, `weights` the SHA-256 of the embedding matrix
    rounded to bfloat16. `probe` holds a few logits of a fixed prompt, which are compared with a
    tolerance because kernels differ. `dtype` is the dtype in which the model computed them.
    """

    config: str
    weights: str
    probe: tuple[float, ...]
    dtype: str

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint in a record of a model.

        Raises KeyError, TypeError or ValueError if the record has no valid one.
        """
        probe = tuple(map(float, record["probe"]))
        return cls(record["config"], record["weights"], probe, record["dtype"])

    def matches(self, other: Fingerprint) -> bool:
        """True if both are of the same model.

        Configuration, hash of the weights and probe logits must agree. Each probe logit may differ
        by 2 % of its size + 0.1. If either model computes in fewer than 32 bits, the root mean
        square of the differences may instead be a quarter of the logits' standard deviation + 0.1,
        because rounding errors add up over layers (0.2 of it in 48 layers of bfloat16). The hash of
        the weights is not compared if either model is in float16, because weights converted to
        float16 round to other bfloat16 numbers.
        """
        dtypes, n = {self.dtype, other.dtype}, len(self.probe)
        weights = self.weights == other.weights or "float16" in dtypes
        if self.config != other.config or not weights or n != len(other.probe):
            return False
        pairs = zip(self.probe, other.probe, strict=True)
        close = all(abs(a - b) <= 0.1 + 0.02 * abs(a) for a, b in pairs)
        if close or dtypes <= {"float32", "float64"}:
            return close
        rms = math.dist(self.probe, other.probe) / math.sqrt(n)
        return rms <= 0.1 + 0.25 * statistics.pstdev(self.probe)


def _lasting(settings: Any) -> Any:
    """Settings without the volatile ones, also in nested configurations."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: _lasting(value) for name, value in settings.items() if name not in VOLATILE}


def fixed_prompt(lm: FrozenLM) -> Int[Tensor, "1 8"]:
    """Eight token ids, the same for every model of the same vocabulary."""
    rows = int(lm.embedding.weight.shape[0])  # type: ignore[index,union-attr]
    return (torch.arange(1, 9, device=lm.device) * 7919 % rows)[None]


@torch.no_grad()
def probe_logits(lm: FrozenLM) -> Float[Tensor, "8 V"]:
    """The model's own logits of the fixed prompt, float32.

    Raises MemvecError for a model whose forward pass on tokens fails.
    """
    try:
        return lm.own_logits(fixed_prompt(lm))[0]
    except Exception as error:  # foreign code may raise any error
        raise MemvecError(
            f"{lm.name} cannot be crammed: its own forward on plain tokens fails "
            f"({first_line(error)})."
        ) from error


class Unchanged:
    """True as long as a model's parameters have not changed since this object was made.

    It compares PyTorch's count of in-place changes of each parameter (changes through `.data` are
    not counted). A copy or pickle of this object counts from zero, because PyTorch does so for
    copied parameters; if the model had changed before, the copy is False, too.
    """

    def __init__(self, model: nn.Module, so_far: bool = True) -> None:
        self.model, self.so_far, self.state = model, so_far, _state(model)

    def __bool__(self) -> bool:
        return self.so_far and _state(self.model) == self.state

    def __reduce__(self) -> tuple[type[Unchanged], tuple[nn.Module, bool]]:
        return Unchanged, (self.model, bool(self))


def _state(model: nn.Module) -> list[Any]:
    parameters = (p for p in model.parameters() if not p.is_inference())
    return [(p._version, p.dtype, p.device) for p in parameters]


def fingerprint_of(
    config: Any,
    embedding: Float[Tensor, "V D"],
    logits: Float[Tensor, " V"],
    dtype: str | None = None,
) -> Fingerprint:
    """The fingerprint of a model from its configuration, embedding matrix and probe logits.

    `logits` are those of the last position of the probe; eight of them are kept. `dtype` names the
    dtype of computation, if it is not the dtype of the matrix.
    """
    described = json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode()
    rounded = embedding.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    probe = logits[:: max(1, len(logits) // 8)][:8]
    return Fingerprint(
        hashlib.sha256(described).hexdigest(),
        hashlib.sha256(rounded.data).hexdigest(),
        tuple(round(float(x), 3) for x in probe),
        dtype or str(embedding.dtype).removeprefix("torch."),
    )
