"""Export for `generate(inputs_embeds=...)` of transformers: a safetensors file per passage.

The file holds one tensor `inputs_embeds` (1, N, D) in the model's dtype: the [mem] vectors, then
the embeddings of the start rule's tokens, if any. `generate` itself decodes for the certificate.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from memvec.errors import MemvecError
from memvec.export.target import Item, Target, decoder, prompt
from memvec.usable.generation_config import generating_by

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Transformers(Target):
    """The export target `generate(inputs_embeds=...)` of transformers."""

    description = "generate(inputs_embeds=...) of transformers"
    suffix = ".safetensors"
    programs: ClassVar[dict[str, Path]] = decoder("decode_transformers.py", "transformers_model.py")
    argument = "MODEL_FOLDER"

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        save_file({"inputs_embeds": prompt(item, lm)[None].contiguous()}, path)

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        inputs: Tensor = load_file(path)["inputs_embeds"]
        return inputs[0]

    def decode(self, path: Path, item: Item, lm: FrozenLM) -> list[int]:
        return generated(lm, self.read(path, item, lm), item.new_tokens)

    def certified_by(self) -> str:
        return f"transformers {version('transformers')}"


@torch.no_grad()
def generated(lm: FrozenLM, inputs: Float[Tensor, "N D"], new_tokens: int) -> list[int]:
    """Exactly `new_tokens` token ids that the model's own `generate` gives greedily after inputs.

    Raises MemvecError for a model whose `generate` takes no vectors.
    """
    if not new_tokens:
        return []
    try:
        ids = plainly_generating(lm).generate(
            inputs_embeds=inputs[None].to(lm.device), max_new_tokens=new_tokens, do_sample=False
        )
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise MemvecError(
            f"generate() of {lm.name} does not take inputs_embeds "
            f"({reason[0] if reason else type(error).__name__})."
        ) from error
    written: list[int] = ids[0].tolist()
    return written


def plainly_generating(lm: FrozenLM) -> Any:
    """A shallow copy of the model that is greedy, without penalties, and does not stop at EOS.

    A model's own generation config may set any of them.
    """
    return generating_by(lm, GenerationConfig(pad_token_id=0))
