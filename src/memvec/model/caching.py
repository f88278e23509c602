"""The cache of a model's earlier positions: the name of its argument, and whether it works.

This file holds every difference between model families and between releases of transformers. From
5.24 on a forward takes and returns `cache`; earlier releases use `past_key_values`, `cache_params`
(Mamba) or `state` (RWKV). memvec looks at the model, not at the release: it takes the first of
these names that the model's forward accepts. It uses the cache only if decoding with it gives the
same logits as a whole forward pass.

For a model without a usable cache, decoding repeats the whole forward pass for each token. The
reason (`Caching.reason`) is shown at load, in `memvec doctor` and in the certificate.
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

from memvec.errors import first_line
from memvec.model.agreement import agree, spread_ids

NAMES = ("cache", "past_key_values", "cache_params", "state")
SLOW = "each decoded token repeats the whole forward"
# Model types of transformers without a cache that a caller can pass in, with the reason.
KEEP_NONE = {
    "openai-gpt": "GPT keeps none",
    "recurrent_gemma": "RecurrentGemma keeps its states inside its own layers",
    "reformer": "Reformer keeps buckets of states, not a cache",
    "xlm": "XLM keeps none",
    "xlnet": "XLNet keeps segments of states, not a cache",
}


@dataclass(frozen=True)
class Caching:
    """The name of a model's cache argument, or the reason why decoding uses no cache.

    `argument` is None without a usable cache. `fault` is True if the model's configuration has the
    setting `use_cache` but its forward takes or returns a cache under none of the known names:
    memvec then lacks support for this model or this release of transformers.
    """

    argument: str | None
    reason: str | None = None
    fault: bool = False

    @property
    def sentence(self) -> str:
        """The warning about a model without a usable cache; the model's name goes before it."""
        blame = "; this is an error of memvec, please report it" if self.fault else ""
        return f"decodes without a cache ({self.reason}), so {SLOW}{blame}."


def forward_with_cache(
    model: nn.Module, argument: str, cache: Any = None, **inputs: Tensor
) -> tuple[Float[Tensor, "B V"], Any]:
    """One forward pass with the cache: float32 logits of the last position, and the new cache."""
    if cache is not None:
        inputs[argument] = cache
    out = model(**inputs, **_options(type(model).forward))
    return out.logits[:, -1].float(), out.get(argument)


def cache_arguments(argument: str | None, cache: Any) -> dict[str, Any]:
    """Keyword arguments of a forward pass that continues from `cache` (None: without a cache)."""
    return {"use_cache": False} if cache is None else {"use_cache": True, str(argument): cache}


@torch.no_grad()
def cached_logits(
    model: nn.Module,
    argument: str,
    vectors: Float[Tensor, "B K D"],
    ids: Int[Tensor, "B T"],
    first: tuple[Float[Tensor, "B V"], Any] | None = None,
) -> Float[Tensor, "B T V"]:
    """Teacher-forced logits of `ids` after `vectors`, one token at a time with the cache.

    `first` is the result of `forward_with_cache` for the vectors, if the caller has it already.
    """
    logits, cache = first or forward_with_cache(model, argument, inputs_embeds=vectors)
    steps = [logits]
    for t in range(ids.shape[1] - 1):
        logits, cache = forward_with_cache(model, argument, cache, input_ids=ids[:, t : t + 1])
        steps.append(logits)
    return torch.stack(steps, dim=1)


@torch.no_grad()
def find_cache(
    model: nn.Module, embedding: nn.Module, rounding: torch.dtype = torch.float32
) -> Caching:
    """Look for a model's cache and compare decoding with it to a whole forward pass.

    `rounding` is the dtype of the model's matrix products, which sets the tolerance. Two texts of
    seven tokens each are decoded as one batch, because some models mix the rows of a batch when
    they read one token at a time.
    """
    config: Any = model.config
    argument = _argument(type(model).forward)
    ids = spread_ids(embedding, 7)
    ids = torch.cat([ids, ids.flip(1)])
    try:
        if argument is None:
            return _without(config)
        two = embedding(ids[:, :2])
        after_two = forward_with_cache(model, argument, inputs_embeds=two)
        if after_two[1] is None:
            return _without(config)
        ours = cached_logits(model, argument, two, ids[:, 2:], after_two)
        truth = model(inputs_embeds=embedding(ids[:, :-1]), use_cache=False).logits
    except Exception as error:  # a model's own code may raise any error: its cache does not work
        return Caching(None, f"its forward with a cache fails: {first_line(error)}")
    ok, detail = agree(ours, truth[:, 1:].float().to(ours.device), rounding)
    if not ok:
        return Caching(None, f"its cached decoding disagrees with its own forward, {detail}")
    return Caching(argument)


def _without(config: Any) -> Caching:
    """The result for a model without a cache: the reason, and whether this is a fault of memvec."""
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
    """The name of the argument in which a forward takes its cache; None without one."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), None)


@functools.cache
def _options(forward: Callable[..., Any]) -> dict[str, Any]:
    """Options of a forward pass with the cache; logits of the last position only, if it can."""
    parameters = inspect.signature(forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in parameters else {})
