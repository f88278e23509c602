"""The cache of a model's earlier positions: what its family calls it, and whether it can be used.

Every difference between families and between releases of transformers is in this file. From 5.24 on
a forward takes and returns `cache`; before, it was `past_key_values`, `cache_params` (Mamba) or
`state` (RWKV). The model decides, not the release: the name is the first of these that its forward
accepts, and the cache counts as usable only after decoding with it gave the logits of a whole
forward.

A model without a usable cache is decoded by repeating its whole forward for each token. That is
never silent: `Caching.reason` says why, at load, in `memvec doctor` and in the certificate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.model.agreement import agree

NAMES = ("cache", "past_key_values", "cache_params", "state")
SLOW = "each decoded token repeats the whole forward"
# Families of transformers that keep no cache which a caller can hand in again, by model type.
KEEP_NONE = {
    "openai-gpt": "GPT keeps none",
    "recurrent_gemma": "RecurrentGemma keeps its states inside its own layers",
    "reformer": "Reformer keeps buckets of states, not a cache",
    "xlm": "XLM keeps none",
    "xlnet": "XLNet keeps segments of states, not a cache",
}


@dataclass(frozen=True)
class Caching:
    """The name of a model's cache argument, or why decoding goes without a cache.

    `fault` is True where the model's configuration says that there is a cache and none was found:
    then memvec does not know this model or this release of transformers well enough.
    """

    argument: str | None
    reason: str | None = None
    fault: bool = False

    @property
    def sentence(self) -> str:
        """The end of the warning about a model that is decoded without a cache."""
        blame = "; this is an error of memvec, please report it" if self.fault else ""
        return f"decodes without a cache ({self.reason}), so {SLOW}{blame}."


def step(
    model: nn.Module, argument: str, cache: Any = None, **inputs: Tensor
) -> tuple[Float[Tensor, "B V"], Any]:
    """One forward with the cache: logits in float32 of the last position, and the new cache."""
    if cache is not None:
        inputs[argument] = cache
    out = model(**inputs, **_options(type(model).forward))
    return out.logits[:, -1].float(), out.get(argument)


def behind(argument: str | None, cache: Any) -> dict[str, Any]:
    """Options of a forward behind what a cache holds; without one where there is none."""
    return {"use_cache": False} if cache is None else {"use_cache": True, str(argument): cache}


@torch.no_grad()
def cached_logits(
    model: nn.Module,
    argument: str,
    vectors: Float[Tensor, "B K D"],
    ids: Int[Tensor, "B T"],
    first: tuple[Float[Tensor, "B V"], Any] | None = None,
) -> Float[Tensor, "B T V"]:
    """Teacher-forced logits of `ids` behind `vectors`, one token at a time through the cache.

    `first` is what `step` gave for the vectors, where that forward has been made already.
    """
    logits, cache = first or step(model, argument, inputs_embeds=vectors)
    steps = [logits]
    for t in range(ids.shape[1] - 1):
        logits, cache = step(model, argument, cache, input_ids=ids[:, t : t + 1])
        steps.append(logits)
    return torch.stack(steps, dim=1)


@torch.no_grad()
def find_cache(
    model: nn.Module, embedding: nn.Module, rounding: torch.dtype = torch.float32
) -> Caching:
    """Find a model's cache and compare decoding with it to whole forwards.

    `rounding` is the dtype of the model's products. Two texts of seven tokens each are decoded
    together, since some one-token forwards mix a batch.
    """
    config: Any = model.config
    argument = _argument(type(model).forward)
    rows: Tensor = embedding.weight  # type: ignore[assignment]
    ids = (torch.arange(7, device=rows.device) * 104729 % len(rows))[None]
    ids = torch.cat([ids, ids.flip(1)])
    try:
        if argument is None:
            return _without(config)
        two = embedding(ids[:, :2])
        after_two = step(model, argument, inputs_embeds=two)
        if after_two[1] is None:
            return _without(config)
        ours = cached_logits(model, argument, two, ids[:, 2:], after_two)
        truth = model(inputs_embeds=embedding(ids[:, :-1]), use_cache=False).logits
    except Exception as error:  # the model's code is not ours: whatever it raises is its answer
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Caching(None, f"its forward with a cache fails: {first}")
    ok, detail = agree(ours, truth[:, 1:].float().to(ours.device), rounding)
    if not ok:
        return Caching(None, f"its cached decoding disagrees with its own forward, {detail}")
    return Caching(argument)


def _without(config: Any) -> Caching:
    """Why no cache was found, and whether one should have been."""
    if (why := KEEP_NONE.get(config.model_type)) is not None:
        return Caching(None, why)
    if hasattr(config.get_text_config(), "use_cache"):
        names = ", ".join(NAMES)
        return Caching(
            None,
            f"its configuration says that it keeps one, under none of the known names: {names}",
            fault=True,
        )
    return Caching(None, "it keeps none")


def _argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a forward takes its cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


@functools.cache
def _options(forward: Callable[..., Any]) -> dict[str, Any]:
    """Options of a forward with the cache; only the last position's logits where it can do that."""
    parameters = inspect.signature(forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in parameters else {})
