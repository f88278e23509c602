"""mlx-lm: `generate_step(input_embeddings=...)`, one prompt at a time, on MLX's CPU build too.

Some of its models have no such argument (OLMo 2). There the vectors take the place of what the
model looks up in its table of embeddings, for the one pass that reads the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from asked import Prompt, release_of
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import does_model_support_input_embeddings, load_model


def version() -> str:
    """The engine and its release."""
    return f"{release_of('mlx-lm')} ({release_of('mlx')})"


class Engine:
    """A model in one dtype."""

    def __init__(self, model: str, dtype: str, settings: dict[str, Any]) -> None:
        self.dtype = getattr(mx, dtype)
        self.model, _ = load_model(Path(model), model_config=_base_of_rope(Path(model)))
        self.model.set_dtype(self.dtype)

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy token ids after each prompt, one prompt after the other."""
        return [self.generate_one(prompt) for prompt in prompts]

    def generate_one(self, prompt: Prompt) -> list[int]:
        """Greedy token ids after one prompt."""
        if prompt.inputs is None:
            return self.steps(mx.array(prompt.tokens), prompt.new_tokens)
        inputs = mx.array(prompt.inputs).astype(self.dtype)
        if does_model_support_input_embeddings(self.model):
            nothing = mx.array([], dtype=mx.int32)
            return self.steps(nothing, prompt.new_tokens, input_embeddings=inputs)
        cache = make_prompt_cache(self.model)
        first = looked_up(self.model, inputs, cache)
        more = {"prompt_cache": cache}
        return [first, *self.steps(mx.array([first]), prompt.new_tokens - 1, **more)]

    def steps(self, tokens: Any, new_tokens: int, **options: Any) -> list[int]:
        """Greedy token ids of mlx-lm's own generator."""
        if not new_tokens:
            return []
        steps = generate_step(tokens, self.model, max_tokens=new_tokens, **options)
        return [int(token) for token, _ in steps]


class FixedEmbeddings:
    """Stands for a table of embeddings while a prompt of vectors is read."""

    def __init__(self, table: Any, inputs: Any) -> None:
        self.table, self.inputs = table, inputs

    def __call__(self, ids: Any) -> Any:
        """The vectors (1, N, D), whatever the ids."""
        return self.inputs[None]

    def as_linear(self, states: Any) -> Any:
        """Logits of a head that is tied to the embeddings."""
        return self.table.as_linear(states)


def looked_up(model: Any, inputs: Any, cache: Any) -> int:
    """The first token after inputs (N, D) of a model without `input_embeddings`."""
    table = model.model.embed_tokens
    model.model.embed_tokens = FixedEmbeddings(table, inputs)
    try:
        logits = model(mx.zeros((1, len(inputs)), dtype=mx.int32), cache=cache)
        return int(logits[0, -1].argmax().item())
    finally:
        model.model.embed_tokens = table


def _base_of_rope(folder: Path) -> dict[str, Any]:
    """The base of the rotary embedding by the name that mlx-lm's older model code reads.

    transformers 5 writes it inside `rope_parameters`; mlx-lm 0.32 looks there for some model types
    only (Qwen 3), and takes its own default for the others, without a word (Qwen 2, SmolLM 3).
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    return {} if base is None or "rope_theta" in config else {"rope_theta": base}
