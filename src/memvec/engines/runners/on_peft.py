"""PEFT: the vectors are a prompt-tuning adapter, the tokens after them its `input_ids`.

A batch is run prompt by prompt: an adapter holds one passage's vectors. `use_cache=False` because
PEFT 0.21 looks for the cache by the name that transformers gave it before 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from asked import Prompt, release_of
from on_transformers import greedy
from peft import PromptTuningConfig, get_peft_model


def version() -> str:
    """The engine and its release, and that of transformers, which generates."""
    return f"{release_of('peft')} ({release_of('transformers')})"


class Engine:
    """A model, adapted to each prompt's vectors."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.model = greedy(model, dtype)

    @torch.no_grad()
    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt."""
        return [self.generate_one(prompt) for prompt in prompts]

    def generate_one(self, prompt: Prompt) -> list[int]:
        """Greedy token ids after one prompt."""
        prompt_ids = torch.tensor([prompt.tokens], dtype=torch.long)
        settings = {
            "input_ids": prompt_ids,
            "attention_mask": torch.ones_like(prompt_ids),
            "max_new_tokens": prompt.new_tokens,
            "do_sample": False,
            "use_cache": False,
        }
        if prompt.inputs is None:
            ids = self.model.generate(**settings)
        else:
            config = PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=prompt.vectors,
                token_dim=prompt.inputs.shape[1],
                num_transformer_submodules=1,
                num_attention_heads=1,
                num_layers=1,
            )
            adapted: Any = get_peft_model(self.model, config)
            weight = adapted.prompt_encoder["default"].embedding.weight
            weight.copy_(torch.from_numpy(prompt.inputs[: prompt.vectors]))
            ids = adapted.eval().generate(**settings)
        written: list[int] = ids[0, prompt_ids.shape[1] :].tolist()
        return written
