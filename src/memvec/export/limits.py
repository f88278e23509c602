"""Checks for what an engine does not support, before anything is written or started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "mlx": "mlx-lm"}
# Model types whose code in mlx-lm 0.32 takes `input_embeddings` and does not scale them; OLMo 2 is
# added, for which memvec's own runner passes the vectors in (engines/runners/on_mlx.py).
MLX_TAKES = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3", "lfm2"}
MLX_TAKES |= {"olmo2"}
# Model types for which memvec's runner writes the GGUF file for llama.cpp.
GGUF_WRITTEN = {"llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"}
# The dtypes that each engine supports, on a CPU for MLX.
DTYPES = {
    "vllm": ("float32", "bfloat16", "float16"),
    "sglang": ("bfloat16",),
    "llama.cpp": ("float32", "bfloat16", "float16"),
    "mlx": ("float32", "bfloat16", "float16"),
}


def refuse(engine: str, lm: FrozenLM, *, writes_model: bool = True) -> None:
    """Raise MemvecError if `engine` (a key of NAMES) cannot read vectors for this model.

    With `writes_model=False` the engine has its own model file, so the model types for which memvec
    writes GGUF files do not matter.
    """
    name, kind = NAMES[engine], str(lm.config.model_type)
    dtype = str(lm.dtype).removeprefix("torch.")
    if dtype not in DTYPES[engine]:
        raise MemvecError(
            f"{name} takes vectors in {' or '.join(DTYPES[engine])} and {lm.name} is loaded in "
            f"{dtype}: load it in {DTYPES[engine][0]}."
        )
    refuse_per_layer_inputs(lm, name)
    refuse_other_width(lm, name)
    refuse_scaled_embeddings(lm, name)
    if engine == "mlx" and kind not in MLX_TAKES:
        raise MemvecError(
            f"mlx-lm takes no input embeddings for models of the type {kind}: use another engine."
        )
    if engine == "llama.cpp" and writes_model and kind not in GGUF_WRITTEN:
        raise MemvecError(
            f"memvec writes no GGUF file for models of the type {kind}: make it with llama.cpp's "
            "convert_hf_to_gguf.py and give it with model=FILE."
        )


def refuse_per_layer_inputs(lm: FrozenLM, engine: str) -> None:
    """Raise MemvecError for models in which token ids reach every layer (Gemma 3n and 4).

    A vector has no token id, so it depends on the engine what such a layer reads for it.
    """
    config: Any = lm.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", None):
        raise MemvecError(
            f"{lm.name} feeds token ids into every layer, and a vector has none: {engine} cannot "
            "read vectors for it."
        )


@torch.no_grad()
def refuse_scaled_embeddings(lm: FrozenLM, engine: str) -> None:
    """Raise MemvecError for models that scale the embeddings of tokens (Gemma).

    Some engines would scale the vectors again, so the file does not determine the model's inputs.
    """
    ids = torch.arange(1, 5, device=lm.device)
    weight: Tensor = lm.embedding.weight  # type: ignore[assignment]
    if not torch.allclose(lm.embed(ids).float(), weight[ids].float(), rtol=1e-2, atol=1e-4):
        raise MemvecError(
            f"{lm.name} scales its token embeddings, and {engine} may scale given vectors again: "
            f"an export for {engine} cannot be certified; use the target 'transformers'."
        )


def refuse_other_width(lm: FrozenLM, engine: str) -> None:
    """Raise MemvecError where input vectors are not as wide as hidden states (projected OPT)."""
    config: Any = lm.config.get_text_config()
    hidden = int(getattr(config, "hidden_size", lm.width))
    if hidden != lm.width:
        raise MemvecError(
            f"{engine} takes vectors of the hidden size {hidden}, and {lm.name} reads vectors of "
            f"{lm.width}: use the target 'transformers'."
        )
