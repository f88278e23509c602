"""Models with random weights, made in memory: shapes of published models, and tiny ones.

A model with random weights can be crammed (docs/log.md) if its weights are so large that a vector
changes the logits: all matrices are normal with standard deviation 1/sqrt(D).
"""

from __future__ import annotations

import torch
import transformers

from memvec.machine import keep_freed_memory
from memvec.model.lm import FrozenLM

# name → (configuration class of transformers, its options)
SHAPES = {
    "pythia-160m": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50_304,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
        },
    ),
    "pythia-1.4b": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14_336,
            "max_position_embeddings": 8192,
        },
    ),
    "r256": (  # one vector of this untrained model holds a bit per dimension (docs/capacity.md)
        "LlamaConfig",
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 704,
            "max_position_embeddings": 1024,
        },
    ),
    "tiny-llama": (
        "LlamaConfig",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 176,
            "max_position_embeddings": 512,
        },
    ),
    "tiny-gpt2": (
        "GPT2Config",
        {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    ),
    "tiny-qwen3": (
        "Qwen3Config",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 176,
            "max_position_embeddings": 512,
        },
    ),
}


def random_model(
    name: str,
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    on_device: bool = False,
    **changes: int,
) -> FrozenLM:
    """A model of the shape `name` with random weights drawn from the seed.

    `dtype` is torch's or its name; by default bfloat16 on a GPU and float32 on a CPU. `changes`
    replace options of the shape. With `on_device` the weights are drawn on the device and in the
    dtype: they differ from those that a CPU draws, but no second copy of a large model is needed.
    """
    config_class, options = SHAPES[name]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_freed_memory()
    token_ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = getattr(transformers, config_class)(**(token_ids | options | changes))
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    torch.manual_seed(seed)
    draw_device, draw_dtype = (
        (torch.device(device), dtype) if on_device else (torch.device("cpu"), None)
    )
    with draw_device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=draw_dtype)
    std = model.get_input_embeddings().weight.shape[1] ** -0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    return FrozenLM(model.to(device, dtype), name=f"random {name}")
