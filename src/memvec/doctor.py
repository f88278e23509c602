"""Can this model be crammed here? Each check compares what memvec does with what the model does.

The cheap ones run at every load (`refuse_if_unfit`); `memvec doctor` shows them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvec.errors import MemvecError
from memvec.model.agreement import agree

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


CACHE = "decodes with its cache"


@dataclass(frozen=True)
class Check:
    """One finding: what was compared, whether it holds, and the figure or reason."""

    name: str
    ok: bool
    detail: str


def checks(lm: FrozenLM) -> Iterator[Check]:
    """The checks that a model must pass to be served, cheapest first."""
    yield _guard("is causal", _causal, lm)
    yield _guard("takes free input vectors", _own_logits, lm)
    yield _guard("right padding changes nothing", _padding, lm)
    yield _guard("vectors reach every later token", _effect, lm)
    yield _guard(CACHE, _cache, lm)


def refuse_if_unfit(lm: FrozenLM) -> None:
    """Raise MemvecError with the first check that fails.

    A cache that was not found does not stop a model from being served: it is slower, and said so.
    """
    for check in checks(lm):
        if not check.ok and not (check.name == CACHE and not lm.has_cache):
            raise MemvecError(f"{lm.name} cannot be crammed: '{check.name}' fails, {check.detail}.")


def examine(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Everything `memvec doctor` shows of a model, as a dictionary.

    Ends with a round trip: a few tokens are crammed, saved in memory and decoded. A model that does
    not load or fails a check gives `can_be_crammed` False and the reason. `options` are those of
    `load_lm` for big models.
    """
    from memvec.model.lm import load_lm

    report: dict[str, Any] = {"model": name, "checks": [], "facts": {}, "reason": None}
    began = time.perf_counter()
    try:
        lm = load_lm(name, revision=revision, device=device, dtype=dtype, check=False, **options)
    except MemvecError as error:
        report["checks"].append(asdict(Check("loads", False, str(error))))
        return report | {"can_be_crammed": False, "reason": str(error)}
    seconds = time.perf_counter() - began
    report["checks"].append(asdict(Check("loads", True, f"{seconds:.1f} s")))
    found = list(checks(lm))
    if all(check.ok for check in found):
        found.append(round_trip(lm))
    report["checks"] += [asdict(check) for check in found]
    report["facts"] = {
        "width D": lm.width,
        "vocabulary V": lm.vocab_size,
        "context": lm.context or "unlimited",
        "dtype": f"{lm.description()['dtype']} on {lm.device}",
        "attention": lm.description()["attention"],
        "BOS": "none"
        if lm.bos_id is None
        else f"token {lm.bos_id}, added by the tokenizer: "
        + ("yes" if lm.tokenizer is not None and lm.adds_bos else "no"),
        "embedding std": f"{lm.embedding_std:.4g}",
        "logits": "only where needed" if lm.has_split_head else "whole model each time",
        "one-pass encoder": "yes" if lm.encoder is not None else "no",
    }
    failed = [check for check in found if not check.ok]
    if not failed:
        report["facts"]["speed"] = f"{speed(lm):.0f} tokens per second, forward and backward"
    reason = f"'{failed[0].name}' fails, {failed[0].detail}" if failed else None
    return report | {"can_be_crammed": not failed, "reason": reason}


def speed(lm: FrozenLM, tokens: int = 64, batch_size: int = 16, seconds: float = 2.0) -> float:
    """Tokens per second of a forward and backward-to-input pass, `slots` passages at once."""
    tokens = min(tokens, (lm.context or tokens + 1) - 1)
    ids = _ids(lm, tokens).expand(batch_size, -1)
    vectors = torch.zeros(batch_size, 1, lm.width, device=lm.device, requires_grad=True)
    done, start = 0, time.perf_counter()
    while done < 2 or (time.perf_counter() - start < seconds and done < 50):
        loss = lm.logits(vectors, ids).logsumexp(-1).sum()
        float(torch.autograd.grad(loss, vectors)[0].sum())  # waits for the device
        done += 1
    return done * batch_size * tokens / (time.perf_counter() - start)


def round_trip(lm: FrozenLM) -> Check:
    """The last check: a passage crammed, certified and decoded."""
    return _guard("gives a passage back", _round_trip, lm)


def _guard(name: str, check: Callable[[FrozenLM], tuple[bool, str]], lm: FrozenLM) -> Check:
    try:
        ok, detail = check(lm)
    except Exception as error:  # a stranger's code may raise anything: that is the finding
        reason = str(error).strip() or type(error).__name__
        return Check(name, False, f"the model refuses: {reason.splitlines()[0]}")
    return Check(name, ok, detail)


def _ids(lm: FrozenLM, n: int) -> Tensor:
    rows = int(lm.embedding.weight.shape[0])  # type: ignore[index,union-attr]
    return (torch.arange(n, device=lm.device) * 104729 % rows)[None]


@torch.no_grad()
def _own_logits(lm: FrozenLM) -> tuple[bool, str]:
    """Tokens embedded by us and handed in as vectors give the model's own logits."""
    ids = _ids(lm, 7)
    as_vectors = lm.embed(ids[:, :3])
    ours = lm.logits(as_vectors, ids[:, 3:])
    return agree(ours, lm.own_logits(ids)[:, 2:-1], lm.dtype)


@torch.no_grad()
def _padding(lm: FrozenLM) -> tuple[bool, str]:
    ids = _ids(lm, 9)
    vectors = lm.embed(ids[:, :2])
    return agree(lm.logits(vectors, ids[:, 2:])[:, :4], lm.logits(vectors, ids[:, 2:6]), lm.dtype)


@torch.no_grad()
def _causal(lm: FrozenLM) -> tuple[bool, str]:
    ids = _ids(lm, 8)
    changed = ids.clone()
    changed[:, -1] = ids[0, 0]
    truth = lm.own_logits(ids)[:, :-1]
    ok, detail = agree(lm.own_logits(changed)[:, :-1], truth, lm.dtype)
    if not ok and bool(torch.isfinite(truth).all()):
        detail = "a later token changes an earlier prediction"
    return ok, detail


def _effect(lm: FrozenLM) -> tuple[bool, str]:
    ids = _ids(lm, 6)
    # A free vector, not an embedding row: some models single rows out (padding is zeroed).
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
    """Holds for a model that is known to keep no usable cache, too: the detail then says so."""
    if lm.has_cache:
        return True, f"passed on as '{lm.caching.argument}'"
    return not lm.caching.fault, f"it {lm.caching.sentence.removesuffix('.')}"


def _round_trip(lm: FrozenLM) -> tuple[bool, str]:
    """The whole way, small: two tokens in one vector, else in four, else one token in one.

    Untrained models may have a first token that drowns every vector; trained ones pass at once.
    """
    from memvec.cramming.engine import Engine
    from memvec.cramming.recipe import Recipe
    from memvec.passages.passage import Passage

    ids = tuple(_ids(lm, 5)[0, 3:].tolist())
    for K, n in ((1, 2), (4, 2), (1, 1)):
        recipe = Recipe(steps=400, patience=100)
        (outcome,) = Engine(lm, recipe, vectors=K, batch_size=1).run([Passage(ids[:n])])
        if outcome.exact:
            break
    return (
        outcome.exact,
        f"{n} token{'s' * (n > 1)} in {K} vector{'s' * (K > 1)}, "
        f"{outcome.metrics.horizon} decoded, {outcome.steps} steps",
    )
