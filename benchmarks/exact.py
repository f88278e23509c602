"""Exact passages per minute at fixed lengths, against the paper's recipe as its code runs it.

    python benchmarks/exact.py --quick

Both sides are timed end to end, certification by free-running decoding included: by the wall clock,
or where a CPU computes in one thread (OMP_NUM_THREADS=1) by the processor's, so that other work
does not count.

Ours: all passages through one engine under the default recipe, first token counted, its margin;
from noise, as in the paper, and from the model's one-pass encoder where it has one. Theirs: the
recipe of Kuratov et al. one passage at a time in the plain loop of its publication (whole logits,
torch's AdamW, loss and accuracy fetched at each step, first token handed over); loading the model
twice for each passage, which that code does as well, is left out. Both compute in the model's own
dtype. On their side only `--theirs` passages are crammed; their rate is the exact passages per
minute over these.

Their side runs at each learning rate of a sweep (`--lr`; the paper's is 0.01), and each run is read
at several step limits: what it would have been had every passage been given up after so many
steps. Its best rate and limit at each length, seen afterwards, are what ours is compared with; ours
has its default limit.

The models are `pocket` with running prose and R256, random weights with random tokens; `--model` or
`--shape` takes another one alone. Lengths are 30, 60 and 90 % of the model's mean exact horizon
(`--horizon`). RESULT compares ours from noise with their best: `ratio`, the smallest ratio of rates
over all lengths at which they finish anything; `ratio_hard`, the smallest over the models of that
at the longest length at which they finish an eighth of their passages and at least two; each with
its 95 % bootstrap interval over passages (`_low`, `_high`), and `ratio_hard_finished`, the passages
that their side rests on there. `ratio_hard_encoder` is the same for ours from the encoder. Lengths
that they never finish are named, and have no ratio.

`--quick` takes short lengths, and 160 steps for theirs instead of 5000.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common import arguments, clock, report, run, with_ends
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors
from memvec.decoding import decode_ids
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import median_and_spread
from models import SHAPES, random_model
from texts import overlapping, passages_of

# Mean exact horizon, tokens: one vector from noise, 400 and 800 steps (docs/capacity.md).
HORIZONS = {"pocket": 91, "r256": 23}
SHARES = (0.3, 0.6, 0.9)
QUICK = {"pocket": (0.2,), "r256": (0.5,)}  # shares
QUICK_STEPS, QUICK_PASSAGES = 160, 3  # of theirs
PAPER = Recipe.of("paper")
RATES = (PAPER.lr, 0.1, 0.5)
LIMITS = (40, 160, 600, 2000, PAPER.steps)  # steps after which their passages may be given up
DRAWS = 4000


@dataclass(frozen=True)
class Trial:
    """One passage of either side: whether it is exact, its steps, and its seconds with decoding.

    `marks`: seconds until each of LIMITS that it passed.
    """

    exact: bool
    steps: int
    seconds: float
    marks: dict[int, float]

    def given_up_after(self, limit: int) -> Trial:
        """The same trial with at most `limit` steps."""
        if self.steps <= limit:
            return self
        return Trial(False, limit, self.marks[limit], {})


def as_published(lm: FrozenLM, passage: Passage, lr: float, steps: int) -> Trial:
    """One passage by the published loop at a learning rate."""
    began, marks = clock(), {}
    ids = torch.tensor([passage.ids], device=lm.device)
    (start,) = start_vectors(lm, [passage.ids], 1, PAPER)
    memory = torch.nn.Parameter(start.to(lm.device))
    optimizer = torch.optim.AdamW(
        [memory], lr=lr, betas=(PAPER.beta1, PAPER.beta2), weight_decay=PAPER.weight_decay
    )
    best, kept, stale, taken = 0.0, memory.detach().clone(), 0, 0
    while taken < steps and best < 1.0 and stale < PAPER.patience:
        taken += 1
        inputs = torch.cat([memory[None].to(lm.dtype), lm.embed(ids)], dim=1)
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[:, 1:-1].float()
        loss = cross_entropy(logits.flatten(0, 1), ids[0, 1:])
        accuracy = (logits.argmax(-1) == ids[:, 1:]).float().mean().item()
        measured = memory.detach().clone()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        stale += 1
        if accuracy > best:
            best, kept, stale = accuracy, measured, 0
        if taken in LIMITS:
            marks[taken] = clock() - began
    (decoded,) = decode_ids(
        lm, kept[None], [len(passage)], start="first-token", first=[passage.ids[0]]
    )
    return Trial(tuple(decoded) == passage.ids, taken, clock() - began, marks)


def engine_for(lm: FrozenLM, passages: list[Passage], **changes: Any) -> Engine:
    """Our side: the default recipe with some changes, in the model's own dtype."""
    return Engine(lm, Recipe(compute="model", **changes), batch_size=min(32, len(passages)))


def by_engine(lm: FrozenLM, passages: list[Passage], start: str) -> list[Trial]:
    """All passages through one engine; its time is divided in proportion to the engine's counts."""
    engine = engine_for(lm, passages, start=start)
    began = clock()
    outcomes = list(engine.run(passages))
    seconds = clock() - began
    counted = sum(outcome.seconds for outcome in outcomes)
    return [Trial(o.exact, o.steps, o.seconds * seconds / counted, {}) for o in outcomes]


def per_minute(trials: list[Trial]) -> float:
    """Exact passages per minute of the trials."""
    return 60 * sum(t.exact for t in trials) / sum(t.seconds for t in trials)


def ratio_of_rates(ours: list[Trial], published: list[Trial]) -> tuple[float, float, float]:
    """Ratio of exact passages per minute, 95 % bootstrap over the passages of both sides."""
    draws = []
    for seed, trials in enumerate((ours, published)):
        picks = np.random.default_rng(seed).integers(len(trials), size=(DRAWS, len(trials)))
        exact, seconds = np.array([(t.exact, t.seconds) for t in trials], dtype=float).T
        draws.append(exact[picks].sum(1) / seconds[picks].sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(draws[0] / draws[1], nan=1.0, posinf=np.inf)
    low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
    return per_minute(ours) / per_minute(published), float(low), float(high)


def row_of(side: str, start: str, lr: float, limit: int, trials: list[Trial]) -> dict[str, Any]:
    """A row of the table."""
    seconds = median_and_spread([t.seconds for t in trials])
    return {
        "side": side,
        "start": start,
        "lr": lr,
        "step_limit": limit,
        "n": len(trials),
        "exact": sum(t.exact for t in trials),
        "exact_per_minute": per_minute(trials),
        "median_steps": median_and_spread([t.steps for t in trials])[0],
        **dict(zip(("median_s", "low_s", "high_s"), seconds, strict=True)),
    }


def at_length(
    lm: FrozenLM, passages: list[Passage], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of both sides over the same passages, and how ours compare with the best of theirs."""
    list(engine_for(lm, passages, steps=2).run(passages))
    as_published(lm, passages[-1], PAPER.lr, 2)  # first use of kernels, not timed
    ours = {"noise": by_engine(lm, passages, "noise")}
    if lm.encoder is not None:
        ours["encoder"] = by_engine(lm, passages, "encoder")
    recipe = Recipe()
    rows = [row_of("ours", start, recipe.lr_large, recipe.steps, t) for start, t in ours.items()]
    best: list[Trial] = []
    for lr in options.lr:
        whole = [as_published(lm, p, lr, options.steps) for p in passages[: options.theirs]]
        for limit in (*[limit for limit in LIMITS if limit < options.steps], options.steps):
            trials = [t.given_up_after(limit) for t in whole]
            rows.append(row_of("paper", "noise", lr, limit, trials))
            if not best or per_minute(trials) > per_minute(best):
                best, chosen = trials, rows[-1]
    chosen["side"] = "paper, best"
    finished = sum(t.exact for t in best)
    comparison: dict[str, Any] = {"finished": finished, "n": len(best)}
    if finished:
        comparison |= {start: ratio_of_rates(trials, best) for start, trials in ours.items()}
    for row in rows:
        ratio = comparison.get(row["start"]) if row["side"] == "ours" else None
        row["ratio"], row["ratio_low"], row["ratio_high"] = ratio or (math.nan,) * 3
        row["overlap"] = overlapping(passages[: row["n"]])
    return rows, comparison


def result_of(comparisons: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The RESULT line, from the comparisons of each model in the order of length."""
    every = [c["noise"] for each in comparisons.values() for c in each if c["finished"]]
    # The longest length at which their rate rests on more than one passage.
    hard = [
        finishing[-1]
        for each in comparisons.values()
        if (finishing := [c for c in each if c["finished"] >= max(2, c["n"] / 8)])
    ]
    nothing = (math.nan,) * 3
    ratio = min(every, default=nothing)
    worst = min(hard, key=lambda c: float(c["noise"][0]), default={"noise": nothing})
    encoder = min((c["encoder"] for c in hard if "encoder" in c), default=nothing)
    result = {"ratio_hard_finished": float(worst.get("finished", 0))}
    for name, value in (
        ("ratio", ratio),
        ("ratio_hard", worst["noise"]),
        ("ratio_hard_encoder", encoder),
    ):
        result |= with_ends(name, value)
    return result


def main() -> None:
    """Both sides at each length of each model."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(model=None)
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model")
    parser.add_argument("--horizon", type=float, help="of another model: its mean, in tokens")
    parser.add_argument("--shares", type=float, nargs="+", help="lengths as shares of the horizon")
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--theirs", type=int, default=16, help="passages on the paper's side")
    parser.add_argument("--lr", type=float, nargs="+", default=RATES, help="rates of the paper's")
    parser.add_argument("--steps", type=int, default=PAPER.steps, help="most steps of the paper's")
    options = parser.parse_args()
    if options.quick:
        options.passages, options.steps, options.theirs = 16, QUICK_STEPS, QUICK_PASSAGES
    rows: list[dict[str, Any]] = []
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for name in [m for m in (options.model, options.shape) if m] or list(HORIZONS):
        horizon = options.horizon or HORIZONS.get(name)
        if horizon is None:
            parser.error(f"no horizon is known for {name}: give --horizon, in tokens")
        lm = random_model(name) if name in SHAPES else load_lm(name)
        shares = options.shares or (QUICK.get(name, QUICK["pocket"]) if options.quick else SHARES)
        comparisons[name] = []
        for share in sorted(shares):
            T = max(2, round(share * horizon))
            both, comparison = at_length(lm, passages_of(lm, options.passages, T), options)
            rows += [{"model": name, "tokens": T, "share_of_horizon": share, **r} for r in both]
            comparisons[name].append(comparison)
            if not comparison["finished"]:
                print(f"{name}, {T} tokens: the paper's recipe finishes none of {comparison['n']}")
    report("exact", rows, options, **result_of(comparisons))


if __name__ == "__main__":
    run(main)
