"""transformers: `generate(inputs_embeds=...)` of prompts of one length at a time."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


def version() -> str:
    """The engine and its release."""
    return f"transformers {installed('transformers')}"


class Engine:
    """A model that generates greedily, whatever its own generation config says."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model.eval().generation_config = GenerationConfig(pad_token_id=0)

    @torch.no_grad()
    def generate(self, prompts: list[Any], new_tokens: list[int]) -> list[list[int]]:
        """Greedy token ids behind prompts (N, D); those of one length are one batch."""
        found: list[list[int]] = [[] for _ in prompts]
        for length in {len(prompt) for prompt in prompts}:
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            inputs = torch.stack([torch.from_numpy(prompts[i]) for i in rows]).to(self.model.dtype)
            ids = self.model.generate(
                inputs_embeds=inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
                max_new_tokens=max(new_tokens[i] for i in rows),
                do_sample=False,
            ).tolist()
            for i, row in zip(rows, ids, strict=True):
                found[i] = row[: new_tokens[i]]
        return found
