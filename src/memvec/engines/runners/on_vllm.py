"""vLLM, offline: `prompt_embeds`, all prompts of a call scheduled together.

Engine and caller share one process, no graph is compiled, and the tokenizer is left out.
`settings["prefix_caching"]` switches vLLM's cache of prefixes on; it is off without it.
"""

from __future__ import annotations

import os
from importlib.metadata import version as installed
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from vllm import LLM, SamplingParams


def version() -> str:
    """The engine and its release; the CPU build is a distribution of its own."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {installed(name)}"
        except ImportError:  # PackageNotFoundError
            continue
    return "vllm"


class Engine:
    """A model behind vLLM's offline API."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.dtype = getattr(torch, dtype)
        self.llm = LLM(
            model,
            dtype=dtype,
            enable_prompt_embeds=True,
            enable_prefix_caching=bool(settings.get("prefix_caching", False)),
            enforce_eager=True,
            skip_tokenizer_init=True,
        )

    def generate(self, prompts: list[Any], new_tokens: list[int]) -> list[list[int]]:
        """Greedy token ids behind prompts (N, D)."""
        asked = [{"prompt_embeds": torch.from_numpy(p).to(self.dtype)} for p in prompts]
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in new_tokens
        ]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]
