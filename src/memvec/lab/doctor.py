"""`memvec doctor`: every check of a model, a round trip, and how fast it steps on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.agreement import spread_ids
from memvec.model.lm import FrozenLM
from memvec.model.probes import Check, checks, guarded
from memvec.passages.passage import Passage


def examine(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """The report of `memvec doctor` on a model, as a dictionary.

    Ends with a round trip: a few tokens are crammed, saved in memory and decoded. A model that does
    not load or fails a check gives `can_be_crammed` False and the reason. `options` are those of
    `load_lm` for big models.
    """
    report: dict[str, Any] = {"model": name, "checks": [], "facts": {}, "reason": None}
    began = time.perf_counter()
    try:
        lm = load_lm(name, revision=revision, device=device, dtype=dtype, check=False, **options)
    except MemvecError as error:
        report["checks"].append(asdict(Check("loads", False, str(error))))
        return report | {"can_be_crammed": False, "reason": str(error)}
    seconds = time.perf_counter() - began
    report["checks"].append(asdict(Check("loads", True, f"{seconds:.1f} s")))
    results = list(checks(lm))
    if all(check.ok for check in results):
        results.append(round_trip(lm))
    report["checks"] += [asdict(check) for check in results]
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
        "for use": f"trigger: {'its own' if lm.own_trigger else 'BOS' if lm.trigger else 'none'}, "
        f"encoder: {_encoder_for_use(lm)}",
    }
    failed = [check for check in results if not check.ok]
    if not failed:
        report["facts"]["speed"] = f"{speed(lm):.0f} tokens per second, forward and backward"
    reason = f"'{failed[0].name}' fails, {failed[0].detail}" if failed else None
    return report | {"can_be_crammed": not failed, "reason": reason}


def _encoder_for_use(lm: FrozenLM) -> str:
    """'yes' if usable vectors start from an encoder; otherwise why they do not."""
    if lm.usable_encoder is None:
        return "no"
    return "yes" if lm.usable_encoder.fits(lm, Recipe.of("usable")) else "of another trigger"


def speed(lm: FrozenLM, tokens: int = 64, batch_size: int = 16, seconds: float = 2.0) -> float:
    """Tokens per second of a forward pass and a backward pass to the inputs.

    `batch_size` passages of `tokens` tokens are computed at once, for about `seconds` seconds.
    """
    tokens = min(tokens, (lm.context or tokens + 1) - 1)
    ids = spread_ids(lm.embedding, tokens).expand(batch_size, -1)
    vectors = torch.zeros(batch_size, 1, lm.width, device=lm.device, requires_grad=True)
    done, start = 0, time.perf_counter()
    while done < 2 or (time.perf_counter() - start < seconds and done < 50):
        loss = lm.logits(vectors, ids).logsumexp(-1).sum()
        float(torch.autograd.grad(loss, vectors)[0].sum())  # waits for the device
        done += 1
    return done * batch_size * tokens / (time.perf_counter() - start)


def round_trip(lm: FrozenLM) -> Check:
    """The last check: a passage crammed, certified and decoded."""
    return guarded("gives a passage back", _round_trip, lm)


def _round_trip(lm: FrozenLM) -> tuple[bool, str]:
    """Cram and decode two tokens in one vector; if that fails in four; at last one token in one.

    Trained models pass at the first attempt. In an untrained model the first token may attract so
    much attention that one vector has no effect.
    """
    ids = tuple(spread_ids(lm.embedding, 5)[0, 3:].tolist())
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
