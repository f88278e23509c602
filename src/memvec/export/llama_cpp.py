"""Export for llama.cpp's `llama_batch.embd`: NumPy files of the vectors, and two programs.

`passage-0000.npy` holds (K, D) float32, the numbers of the model's dtype; the manifest
lists the tokens of the start rule (`given`), which follow in `llama_batch.token`. `decode.py`
decodes the folder with llama-cpp-python; `make_gguf.py` writes the model file for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memvec.export.limits import refuse
from memvec.export.target import Item, Target, decoder, embedded

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class LlamaCpp(Target):
    """The export target `llama_batch.embd` of llama.cpp."""

    description = "llama_batch.embd of llama.cpp, with a program that decodes them"
    suffix = ".npy"
    programs: ClassVar[dict[str, Path]] = {
        **decoder("decode_llama_cpp.py"),
        "make_gguf.py": Path(__file__).parent.parent / "engines" / "runners" / "gguf_of.py",
    }
    argument = "MODEL_FOLDER"

    def refuse(self, lm: FrozenLM) -> None:
        # The model file may come from llama.cpp's own program, whatever the model's type is.
        refuse("llama.cpp", lm, writes_model=False)

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        np.save(path, item.vectors.to(lm.dtype).float().numpy(), allow_pickle=False)

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        vectors = torch.from_numpy(np.load(path, allow_pickle=False)).to(lm.dtype)
        return torch.cat([vectors, embedded(item.given, lm)])
