"""Export for any other software: the [mem] vectors (K, D) of each passage as a NumPy file.

The files are in float16 for a float16 model, else in float32 (NumPy has no bfloat16). The numbers
are rounded to the model's dtype, so a cast to it loses nothing. The manifest lists the tokens of
the start rule (`given`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memvec.export.target import Item, Target, embedded

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Npy(Target):
    """The export target of NumPy files."""

    description = "NumPy files of the vectors, one per passage"
    suffix = ".npy"

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        vectors = item.vectors.to(lm.dtype)
        if lm.dtype != torch.float16:
            vectors = vectors.float()
        np.save(path, vectors.numpy(), allow_pickle=False)

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        vectors = torch.from_numpy(np.load(path, allow_pickle=False)).to(lm.dtype)
        return torch.cat([vectors, embedded(item.given, lm)])
