"""transformers: `generate(inputs_embeds=...)`; the prompts of one length are one batch."""

from __future__ import annotations

from typing import Any

import torch
from asked import Prompt, release_of
from transformers import AutoModelForCausalLM, GenerationConfig


def version() -> str:
    """The engine and its release."""
    release: str = release_of("transformers")
    return release


def greedy(model: str, dtype: str) -> Any:
    """The model in a folder, which generates greedily whatever its own generation config says."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    loaded.eval().generation_config = GenerationConfig(pad_token_id=0)
    return loaded


class Engine:
    """A model of transformers in one dtype."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.model = greedy(model, dtype)

    @torch.no_grad()
    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt."""
        inputs = [self.inputs(prompt) for prompt in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        for length in sorted({len(inputs_of_one) for inputs_of_one in inputs}):
            rows = [i for i, inputs_of_one in enumerate(inputs) if len(inputs_of_one) == length]
            stacked = torch.stack([inputs[i] for i in rows])
            written = self.model.generate(
                inputs_embeds=stacked,
                attention_mask=torch.ones(stacked.shape[:2], dtype=torch.long),
                max_new_tokens=max(prompts[i].new_tokens for i in rows),
                do_sample=False,
            ).tolist()
            for i, row in zip(rows, written, strict=True):
                ids[i] = row[: prompts[i].new_tokens]
        return ids

    def inputs(self, prompt: Prompt) -> torch.Tensor:
        """What the model reads, (N, D)."""
        if prompt.inputs is None:
            embedded: torch.Tensor = self.model.get_input_embeddings()(torch.tensor(prompt.tokens))
            return embedded
        return torch.from_numpy(prompt.inputs).to(self.model.dtype)
