"""Exact passages per minute at fixed lengths: memvec, and the paper's recipe in its published loop.

    python benchmarks/exact.py --quick

Both sides are timed from the start of cramming to the end of free-running decoding, which certifies
a passage. The time is that of the wall clock, or processor time if a CPU computes in one thread
(OMP_NUM_THREADS=1), so that other processes do not count.

*Our side* (`ours`) crams all passages in one engine with the default recipe and its margin; the
first token counts. It runs from noise, as the paper does, and from the model's one-pass encoder
where the model has one. The *paper's side* (`paper`) crams one passage at a time by the recipe of
Kuratov et al. in the plain loop of their code: logits of all positions, torch's AdamW, loss and
accuracy fetched at each step, and the first token given. Their code also loads the model twice for
each passage; that is not timed. Both compute in the model's own dtype. The paper's side crams only
`--theirs` of the passages.

The paper's side runs at each learning rate of `--lr` (the paper's is 0.01). Each run is evaluated
at several step limits: a passage that is not exact within the limit counts as given up there. Our
side, with its default limit, is compared with the rate and limit that are best at this length,
which are chosen afterwards.

The models are `pocket` with prose, and `r256`, which has random weights and random tokens;
`--model` or `--shape` names another one instead. Lengths are 30, 60 and 90 % of the model's mean
exact horizon (`--horizon`).

The table has a row for each side, start, rate and limit: exact passages of n, exact passages per
minute, the median steps, the median seconds of a passage with the 10th and 90th percentile
(`low_s`, `high_s`), and for our side the ratio to the paper's best rate with its 95 % interval
(bootstrap over passages). `overlap` counts passages that share tokens.

RESULT compares our side from noise with the best of the paper's side, as ratios of exact passages
per minute with their 95 % intervals (`_low`, `_high`): `ratio` is the smallest ratio over all
lengths at which the paper's side finishes a passage. `ratio_hard` takes of each model the longest
length at which the paper's side finishes at least two passages and an eighth of them, and is the
smaller ratio over the models; `ratio_hard_finished` is the number of these passages.
`ratio_hard_encoder` is the same for our side from the encoder. Lengths that the paper's side never
finishes are named and have no ratio.

`--quick` has one short length of each model, 16 passages, 3 of them on the paper's side, and 160
steps for these instead of 5000. Without it the paper's side takes hours on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common import arguments, clock, report, with_ends
from memvec.cli.program import run_program
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

# Mean exact horizon in tokens of one vector from noise: pocket after 400 steps, r256 after 800
# (docs/capacity.md).
HORIZONS = {"pocket": 91, "r256": 23}
SHARES = (0.3, 0.6, 0.9)  # lengths as shares of the horizon
QUICK = {"pocket": (0.2,), "r256": (0.5,)}  # shares of the horizon with --quick
QUICK_STEPS, QUICK_PASSAGES = 160, 3  # of the paper's side
PAPER = Recipe.of("paper")
RATES = (PAPER.lr, 0.1, 0.5)
LIMITS = (40, 160, 600, 2000, PAPER.steps)  # steps after which the paper's side may give up
DRAWS = 4000  # resamples of a bootstrap


@dataclass(frozen=True)
class Trial:
    """One passage of either side: whether it is exact, its steps, and its seconds with decoding.

    `marks`: step limit → seconds until that step, for each of LIMITS that was reached.
    """

    exact: bool
    steps: int
    seconds: float
    marks: dict[int, float]

    def given_up_after(self, limit: int) -> Trial:
        """The trial as it would have been with at most `limit` steps: longer ones are not exact."""
        if self.steps <= limit:
            return self
        return Trial(False, limit, self.marks[limit], {})


def as_published(lm: FrozenLM, passage: Passage, lr: float, steps: int) -> Trial:
    """Cram one passage by the paper's recipe in its published loop, at a learning rate."""
    beginning, seconds_at = clock(), {}
    ids = torch.tensor([passage.ids], device=lm.device)
    (start,) = start_vectors(lm, [passage.ids], 1, PAPER)
    memory = torch.nn.Parameter(start.to(lm.device))
    optimizer = torch.optim.AdamW(
        [memory], lr=lr, betas=(PAPER.beta1, PAPER.beta2), weight_decay=PAPER.weight_decay
    )
    best, best_memory, steps_without_gain, steps_done = 0.0, memory.detach().clone(), 0, 0
    while steps_done < steps and best < 1.0 and steps_without_gain < PAPER.patience:
        steps_done += 1
        inputs = torch.cat([memory[None].to(lm.dtype), lm.embed(ids)], dim=1)
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[:, 1:-1].float()
        loss = cross_entropy(logits.flatten(0, 1), ids[0, 1:])
        accuracy = (logits.argmax(-1) == ids[:, 1:]).float().mean().item()
        measured = memory.detach().clone()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        steps_without_gain += 1
        if accuracy > best:
            best, best_memory, steps_without_gain = accuracy, measured, 0
        if steps_done in LIMITS:
            seconds_at[steps_done] = clock() - beginning
    (decoded,) = decode_ids(
        lm, best_memory[None], [len(passage)], start_rule="first-token", first=[passage.ids[0]]
    )
    return Trial(tuple(decoded) == passage.ids, steps_done, clock() - beginning, seconds_at)


def engine_for(lm: FrozenLM, passages: list[Passage], **changes: Any) -> Engine:
    """Our side: the default recipe with some changes, in the model's own dtype."""
    return Engine(lm, Recipe(compute="model", **changes), batch_size=min(32, len(passages)))


def by_engine(lm: FrozenLM, passages: list[Passage], start: str) -> list[Trial]:
    """Cram all passages in one engine.

    The time of the run is divided among the passages in proportion to the seconds that the engine
    counts for each.
    """
    engine = engine_for(lm, passages, start=start)
    began = clock()
    outcomes = list(engine.run(passages))
    seconds = clock() - began
    counted_seconds = sum(outcome.seconds for outcome in outcomes)
    return [
        Trial(outcome.exact, outcome.steps, outcome.seconds * seconds / counted_seconds, {})
        for outcome in outcomes
    ]


def per_minute(trials: list[Trial]) -> float:
    """Exact passages per minute of the trials."""
    return 60 * sum(trial.exact for trial in trials) / sum(trial.seconds for trial in trials)


def ratio_of_rates(ours: list[Trial], published: list[Trial]) -> tuple[float, float, float]:
    """Ratio of exact passages per minute with its 95 % interval (lower end, upper end).

    The interval is a bootstrap over the passages of both sides.
    """
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
    """A row of the table for one side, start, learning rate and step limit."""
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
    """(rows of both sides over the same passages, our rates divided by the paper's best rate)."""
    list(engine_for(lm, passages, steps=2).run(passages))
    # The first use of a kernel takes longer, so neither side is timed here.
    as_published(lm, passages[-1], PAPER.lr, 2)
    ours = {"noise": by_engine(lm, passages, "noise")}
    if lm.encoder is not None:
        ours["encoder"] = by_engine(lm, passages, "encoder")
    recipe = Recipe()
    rows = [
        row_of("ours", start, recipe.lr_large, recipe.steps, trials)
        for start, trials in ours.items()
    ]
    best: list[Trial] = []
    for lr in options.lr:
        full_trials = [
            as_published(lm, passage, lr, options.steps) for passage in passages[: options.theirs]
        ]
        for limit in (*[limit for limit in LIMITS if limit < options.steps], options.steps):
            trials = [trial.given_up_after(limit) for trial in full_trials]
            rows.append(row_of("paper", "noise", lr, limit, trials))
            if not best or per_minute(trials) > per_minute(best):
                best, chosen = trials, rows[-1]
    chosen["side"] = "paper, best"
    finished = sum(trial.exact for trial in best)
    comparison: dict[str, Any] = {"finished": finished, "n": len(best)}
    if finished:
        comparison |= {start: ratio_of_rates(trials, best) for start, trials in ours.items()}
    for row in rows:
        ratio = comparison.get(row["start"]) if row["side"] == "ours" else None
        row["ratio"], row["ratio_low"], row["ratio_high"] = ratio or (math.nan,) * 3
        row["overlap"] = overlapping(passages[: row["n"]])
    return rows, comparison


def result_of(comparisons: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The RESULT line, from the comparisons of each model in the order of their lengths."""
    noise_ratios = [
        comparison["noise"]
        for of_lengths in comparisons.values()
        for comparison in of_lengths
        if comparison["finished"]
    ]
    # The longest length of each model at which more than one passage decides the paper's rate.
    hardest = [
        with_rate[-1]
        for of_lengths in comparisons.values()
        if (
            with_rate := [
                comparison
                for comparison in of_lengths
                if comparison["finished"] >= max(2, comparison["n"] / 8)
            ]
        )
    ]
    no_ratio = (math.nan,) * 3
    ratio = min(noise_ratios, default=no_ratio)
    worst = min(
        hardest, key=lambda comparison: float(comparison["noise"][0]), default={"noise": no_ratio}
    )
    encoder = min(
        (comparison["encoder"] for comparison in hardest if "encoder" in comparison),
        default=no_ratio,
    )
    result = {"ratio_hard_finished": float(worst.get("finished", 0))}
    for name, value in (
        ("ratio", ratio),
        ("ratio_hard", worst["noise"]),
        ("ratio_hard_encoder", encoder),
    ):
        result |= with_ends(name, value)
    return result


def main() -> None:
    """Run both sides at each length of each model."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(model=None)
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of the two")
    parser.add_argument(
        "--horizon", type=float, help="mean exact horizon of another model, in tokens"
    )
    parser.add_argument("--shares", type=float, nargs="+", help="lengths, as shares of the horizon")
    parser.add_argument("--passages", type=int, default=64, help="of each length, our side")
    parser.add_argument("--theirs", type=int, default=16, help="passages of the paper's side")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=RATES, help="learning rates of the paper's side"
    )
    parser.add_argument(
        "--steps", type=int, default=PAPER.steps, help="step limit of the paper's side"
    )
    options = parser.parse_args()
    if options.quick:
        options.passages, options.steps, options.theirs = 16, QUICK_STEPS, QUICK_PASSAGES
    rows: list[dict[str, Any]] = []
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for name in [
        name_or_none for name_or_none in (options.model, options.shape) if name_or_none
    ] or list(HORIZONS):
        horizon = options.horizon or HORIZONS.get(name)
        if horizon is None:
            parser.error(f"no horizon is known for {name}: give --horizon, in tokens")
        lm = random_model(name) if name in SHAPES else load_lm(name)
        shares = options.shares or (QUICK.get(name, QUICK["pocket"]) if options.quick else SHARES)
        comparisons[name] = []
        for share in sorted(shares):
            T = max(2, round(share * horizon))
            rows_of_length, comparison = at_length(
                lm, passages_of(lm, options.passages, T), options
            )
            rows += [
                {"model": name, "tokens": T, "share_of_horizon": share, **row}
                for row in rows_of_length
            ]
            comparisons[name].append(comparison)
            told = (
                f"{row['side']} from {row['start']} {row['exact']} of {row['n']} exact, "
                f"{row['exact_per_minute']:.2f} a minute"
                for row in rows_of_length
                if row["side"] != "paper"
            )
            print(f"{name}, {T} tokens: {'; '.join(told)}", file=sys.stderr, flush=True)
            if not comparison["finished"]:
                print(f"{name}, {T} tokens: the paper's recipe finishes none of {comparison['n']}")
    report("exact", rows, options, **result_of(comparisons))


if __name__ == "__main__":
    run_program(main)
