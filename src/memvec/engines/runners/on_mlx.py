"""mlx-lm: `generate_step(input_embeddings=...)`, one prompt at a time, on MLX's CPU build too."""

from __future__ import annotations

import json
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlx.core as mx
from asked import Prompt
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def version() -> str:
    """The engine and its release."""
    return f"mlx-lm {installed('mlx-lm')} (mlx {installed('mlx')})"


class Engine:
    """A model in one dtype; its `generate` raises ValueError if it takes no embeddings."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.dtype = getattr(mx, dtype)
        self.model, _ = load_model(Path(model), model_config=_base_of_rope(Path(model)))
        self.model.set_dtype(self.dtype)

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids behind each prompt, one prompt after the other."""
        return [self.one(prompt) for prompt in prompts]

    def one(self, prompt: Prompt) -> list[int]:
        """Greedy token ids behind one prompt."""
        if prompt.inputs is None:
            steps = generate_step(mx.array(prompt.tokens), self.model, max_tokens=prompt.new_tokens)
        else:
            steps = generate_step(
                mx.array([], dtype=mx.int32),
                self.model,
                max_tokens=prompt.new_tokens,
                input_embeddings=mx.array(prompt.inputs).astype(self.dtype),
            )
        return [int(token) for token, _ in steps]


def _base_of_rope(folder: Path) -> dict[str, Any]:
    """The base of the rotary embedding by the name that mlx-lm's older model code reads.

    transformers 5 writes it inside `rope_parameters`; mlx-lm 0.32 looks there for some model types
    only (Qwen 3), and takes its own default for the others, without a word (Qwen 2, SmolLM 3).
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    return {} if base is None or "rope_theta" in config else {"rope_theta": base}
