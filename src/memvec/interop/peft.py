"""For PEFT: one prompt-tuning adapter (a folder) per passage.

`adapter_config.json` says PROMPT_TUNING with K virtual tokens, `adapter_model.safetensors` holds
one tensor `prompt_embeddings` (K, D). PEFT puts it in front of the embeddings of `input_ids`, in
their dtype; those ids are in the manifest (`given`: none, unless the start rule gives a token).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from memvec.interop.target import Item, Target, embedded

if TYPE_CHECKING:
    from memvec.lm import FrozenLM


class Peft(Target):
    """A prompt-tuning adapter."""

    name = "peft"
    says = "prompt-tuning adapters of PEFT, one per passage"
    suffix = ""

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        path.mkdir()
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": lm.name,
            "revision": lm.revision,
            "inference_mode": True,
            "num_virtual_tokens": len(item.vectors),
            "token_dim": lm.width,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        vectors = item.vectors.to(lm.dtype).contiguous()
        save_file({"prompt_embeddings": vectors}, path / "adapter_model.safetensors")

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        vectors = load_file(path / "adapter_model.safetensors")["prompt_embeddings"]
        # PEFT holds them in float32 and casts them to the dtype of the token embeddings.
        return torch.cat([vectors.float().to(lm.dtype), embedded(item.given, lm)])
