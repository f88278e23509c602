"""Vectors in use: a prompt behind them, and what the model writes.

The vectors of all passages stand in front, in their order, as the text would; the prompt follows,
and the model's own `generate` writes on, with whatever generation settings it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.errors import MemvecError, check_minimum
from memvec.model.lm import FrozenLM
from memvec.usable.certificate import check_usable
from memvec.usable.queries import text_inputs
from memvec.vectors import MemVectors

Context = Literal["vectors", "text", "nothing"]
NEW_TOKENS = 128  # generated at the most, unless the settings say otherwise
SHORTER = "use fewer passages, or a shorter prompt or answer"


@torch.no_grad()
def use(
    lm: FrozenLM,
    mem: MemVectors | Sequence[MemVectors],
    prompt: str,
    *,
    passages: Sequence[int] | None = None,
    context: Context = "vectors",
    streamer: Any = None,
    **settings: Any,
) -> str:
    """What the model writes behind vectors and a prompt.

    Several files stand one behind the other; `passages` takes some passages of a single file only.
    `context` puts the text itself in the vectors' place, or nothing, for comparison. `settings` go
    to the model's `generate` (`max_new_tokens`, `do_sample`, `temperature` ...; greedy and 128
    tokens without them); `streamer` is one of transformers'. Raises MemvecError for vectors of
    another model, vectors without a trigger, or more inputs than the model's context holds.
    """
    files = [mem] if isinstance(mem, MemVectors) else list(mem)
    if not files:
        raise MemvecError("there are no vectors to use: give at least one file.")
    asked = lm.tokenize(prompt)
    inputs = [context_inputs(lm, one, passages, context) for one in files]
    if context != "vectors" and lm.bos_id is not None:  # one BOS in front of everything
        inputs = [text_inputs(lm, ()), *inputs]
    if asked:
        inputs.append(lm.embed(torch.tensor([asked], device=lm.device)))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    new_tokens = int(options["max_new_tokens"])
    check_minimum(1, max_new_tokens=new_tokens)
    check_room(lm, sum(part.shape[1] for part in inputs), new_tokens, SHORTER)
    together = torch.cat([part.to(lm.dtype) for part in inputs if part.shape[1]], dim=1)
    return write_behind(lm, together, options, streamer)


def write_behind(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], options: dict[str, Any], streamer: Any = None
) -> str:
    """What the model writes behind free inputs; `options` are those of its `generate`.

    Raises MemvecError for a model that does not generate.
    """
    ids, ends = _generated(lm, inputs, streamer, options), set(end_ids(lm))
    return lm.text([token for token in ids if token not in ends])


def context_inputs(
    lm: FrozenLM, mem: MemVectors, passages: Sequence[int] | None, context: Context
) -> Float[Tensor, "1 N D"]:
    """The inputs of one file: its vectors in a row, its text, or nothing.

    Raises MemvecError for vectors of another model, vectors without a trigger, or a passage that is
    not there.
    """
    mem.check_model(lm)
    check_usable(mem)
    which = range(len(mem.passages)) if passages is None else passages
    for i in which:
        if not 0 <= i < len(mem.passages):
            raise MemvecError(f"there is no passage {i} in a file of {len(mem.passages)}.")
    if context == "vectors":
        rows = [mem.vectors[i].float() for i in which]
        return torch.cat(rows)[None].to(lm.device)
    if context == "nothing":
        return text_inputs(lm, ())[:, :0]
    tokens = mem.tokens(lm)
    ids = [token for i in which for token in tokens[i]]
    return lm.embed(torch.tensor([ids], device=lm.device))


def check_room(lm: FrozenLM, inputs: int, answer: int, remedy: str) -> None:
    """Raise MemvecError if inputs and the tokens of an answer are too many, or too few."""
    if inputs < 1:
        raise MemvecError(f"{lm.name} has no start token, so an answer needs a question.")
    if lm.context is not None and inputs + answer > lm.context:
        raise MemvecError(
            f"{inputs} inputs and an answer of {answer} tokens do not fit the context of {lm.name} "
            f"({lm.context}): {remedy}."
        )


def _generated(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], streamer: Any, options: dict[str, Any]
) -> list[int]:
    generate: Any = getattr(lm.model, "generate", None)
    if generate is None:
        raise MemvecError(f"{lm.name} is no model that generates.")
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=lm.device)
    options.setdefault("pad_token_id", end_ids(lm)[0] if end_ids(lm) else 0)
    options.setdefault("use_cache", lm.has_cache)
    out = generate(inputs_embeds=inputs, attention_mask=mask, streamer=streamer, **options)
    ids: list[int] = out[0].tolist()
    return ids


def end_ids(lm: FrozenLM) -> list[int]:
    """The model's end-of-text tokens."""
    end = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)
