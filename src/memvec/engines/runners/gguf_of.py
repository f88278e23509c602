"""A GGUF file of a model's folder, for llama.cpp: the weights and what they are read with.

python gguf_of.py MODEL_FOLDER model.gguf float32       (float32, bfloat16 or float16)

It has no tokenizer (`no_vocab`): llama.cpp takes vectors and token ids and gives token ids back.
It can be made only for families whose attention and norms are written down here; for others, and
for a file that also chats, use llama.cpp's own convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "olmo2": "OLMO2",
    "smollm3": "SMOLLM3",
}
# llama.cpp turns neighbouring numbers of a head where transformers turns its two halves.
NEIGHBOURS = ("LLAMA", "SMOLLM3")
WANTS_HEAD = ("OLMO2",)  # llama.cpp takes the embeddings for a missing head, but not here
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Settings that change what the weights mean, and that are not written down here.
PLAIN = ("rope_scaling", "sliding_window", "attention_bias", "mlp_bias")


def write(folder: Path, path: Path, dtype: str) -> None:
    """Write the model in `folder` to `path`, matrices in `dtype`.

    Raises ValueError for a model whose settings are not all written down here.
    """
    import gguf  # the other functions do without

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = ARCHITECTURES.get(config["model_type"])
    rope = config.get("rope_parameters") or {}
    odd = [key for key in PLAIN if config.get(key)]
    if config.get("model_type") in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        odd = [key for key in odd if key != "sliding_window"]
    if name is None or odd or rope.get("rope_type", "default") != "default":
        why = ", ".join(odd) or rope.get("rope_type") or config["model_type"]
        raise ValueError(
            f"no GGUF file is written here for this model ({why}): make it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    arch = getattr(gguf.MODEL_ARCH, name)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    groups = config.get("num_key_value_heads") or heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)))
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tied = bool(config.get("tie_word_embeddings"))
    for key, weight in weights(folder):
        if key == "lm_head.weight" and tied:
            continue
        short = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if short is None:
            raise ValueError(f"{key} of the model has no name in a GGUF file of {name}.")
        if name in NEIGHBOURS and "q_proj" in key:
            weight = neighbours(weight, heads)
        if name in NEIGHBOURS and "k_proj" in key:
            weight = neighbours(weight, groups)
        kind = gguf.GGMLQuantizationType[TYPES[dtype] if weight.ndim > 1 else "F32"]
        packed = gguf.quants.quantize(np.ascontiguousarray(weight, dtype=np.float32), kind)
        writer.add_tensor(short, packed, raw_dtype=kind)
        if tied and short == "token_embd.weight" and name in WANTS_HEAD:
            writer.add_tensor("output.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight: Any, heads: int) -> Any:
    """Rows of each head in the order in which neighbours are turned together."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def weights(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, float32 array) of every tensor of the model's own safetensors files."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(files):
        data = np.memmap(folder / file, np.uint8, "r")
        size = int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8 : 8 + size].tobytes())
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                yield key, numbers(data[start:end], entry["dtype"]).reshape(entry["shape"])


def numbers(raw: Any, dtype: str) -> Any:
    """Bytes of a tensor as float32. Raises ValueError for a type that is no float."""
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F32", "F16"):
        raise ValueError(f"weights of the type {dtype} are not read here.")
    return raw.view(np.float32 if dtype == "F32" else np.float16).astype(np.float32)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
