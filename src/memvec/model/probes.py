"""Checks whether memvec can cram a model, by comparing its results with the model's own.

They run at every load (`refuse_if_unfit`); `memvec doctor` shows the result of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memvec.errors import MemvecError, first_line
from memvec.model.agreement import agree, spread_ids

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

CACHE = "decodes with its cache"


@dataclass(frozen=True)
class Check:
    """The result of one check: its name, whether it holds, and the figure or the reason."""

    name: str
    ok: bool
    detail: str


def checks(lm: FrozenLM) -> Iterator[Check]:
    """The checks that a model must pass, cheapest first."""
    yield guarded("is causal", _causal, lm)
    yield guarded("takes free input vectors", _own_logits, lm)
    yield guarded("right padding changes nothing", _padding, lm)
    yield guarded("vectors reach every later token", _effect, lm)
    yield guarded(CACHE, _cache, lm)


def refuse_if_unfit(lm: FrozenLM) -> None:
    """Raise MemvecError with the first check that fails.

    A model without a usable cache is accepted: it is only slower, and FrozenLM warns about it.
    """
    for check in checks(lm):
        if not check.ok and not (check.name == CACHE and not lm.has_cache):
            raise MemvecError(f"{lm.name} cannot be crammed: '{check.name}' fails, {check.detail}.")


def guarded(name: str, check: Callable[[FrozenLM], tuple[bool, str]], lm: FrozenLM) -> Check:
    """Run a check; an error that the model raises counts as a failure with that reason."""
    try:
        ok, detail = check(lm)
    except Exception as error:  # foreign code may raise any error
        return Check(name, False, f"the model refuses: {first_line(error).removesuffix('.')}")
    return Check(name, ok, detail)


@torch.no_grad()
def _own_logits(lm: FrozenLM) -> tuple[bool, str]:
    """Embedded tokens that are passed in as vectors give the model's own logits."""
    ids = spread_ids(lm.embedding, 7)
    as_vectors = lm.embed(ids[:, :3])
    ours = lm.logits(as_vectors, ids[:, 3:])
    return agree(ours, lm.own_logits(ids)[:, 2:-1], lm.rounding)


@torch.no_grad()
def _padding(lm: FrozenLM) -> tuple[bool, str]:
    ids = spread_ids(lm.embedding, 9)
    vectors = lm.embed(ids[:, :2])
    padded, alone = lm.logits(vectors, ids[:, 2:])[:, :4], lm.logits(vectors, ids[:, 2:6])
    return agree(padded, alone, lm.rounding)


@torch.no_grad()
def _causal(lm: FrozenLM) -> tuple[bool, str]:
    ids = spread_ids(lm.embedding, 8)
    changed = ids.clone()
    changed[:, -1] = ids[0, 0]
    truth = lm.own_logits(ids)[:, :-1]
    ok, detail = agree(lm.own_logits(changed)[:, :-1], truth, lm.rounding)
    if not ok and bool(torch.isfinite(truth).all()):
        detail = "a later token changes an earlier prediction"
    return ok, detail


def _effect(lm: FrozenLM) -> tuple[bool, str]:
    ids = spread_ids(lm.embedding, 6)
    # A free vector, since embedding rows may be special (the padding row is zero).
    noise = torch.randn(1, 1, lm.width, generator=torch.Generator().manual_seed(0))
    vectors = (noise.to(lm.device) * lm.embedding_std).requires_grad_()
    with torch.enable_grad():
        logits = lm.logits(vectors, ids)
        first, last = (
            torch.autograd.grad(logits[0, i].logsumexp(-1), vectors, retain_graph=i == 0)[0].norm()
            for i in (0, -1)
        )
    if not (torch.isfinite(first) and torch.isfinite(last)):
        return False, "the gradient at the vector is not finite"
    sizes = f"gradient norm {float(first):.1e} at the first token, {float(last):.1e} at token 6"
    return bool(first > 0 and last > 0), sizes


def _cache(lm: FrozenLM) -> tuple[bool, str]:
    """Also passes for a model known to keep no cache; the detail then gives the reason."""
    if lm.has_cache:
        return True, f"given as the argument '{lm.caching.argument}'"
    return not lm.caching.fault, f"it {lm.caching.sentence.removesuffix('.')}"
