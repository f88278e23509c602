"""Export for mlx-lm's `generate_step(input_embeddings=...)`: safetensors files, and a program.

`passage-0000.safetensors` holds one tensor `input_embeddings` (N, D) in the model's dtype: the
vectors, then the embeddings of the start rule's tokens. `decode.py` decodes the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from memvec.export.limits import refuse
from memvec.export.target import Item, Target, decoder, prompt

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Mlx(Target):
    """The export target `input_embeddings` of mlx-lm."""

    description = "input_embeddings of mlx-lm, with a program that decodes them"
    suffix = ".safetensors"
    programs: ClassVar[dict[str, Path]] = decoder("decode_mlx.py")
    argument = "MODEL_FOLDER"

    def refuse(self, lm: FrozenLM) -> None:
        refuse("mlx", lm)

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        save_file({"input_embeddings": prompt(item, lm).contiguous()}, path)

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        inputs: Tensor = load_file(path)["input_embeddings"]
        return inputs
