"""Exact passages per minute at fixed lengths, against the paper's recipe as its code runs it.

    python benchmarks/exact.py --quick

Both sides are timed end to end by the wall clock, certification by free-running decoding included.
Ours: all passages through one engine under the default recipe, first token counted, its margin.
Theirs: the recipe of Kuratov et al. one passage at a time in the plain loop of its publication
(whole logits, torch's AdamW, loss and accuracy fetched at each step, first token handed over);
loading the model twice for each passage, which that code does as well, is left out. `--theirs`
passages stand for all on their side, because most of their time goes into passages that never
finish; their rate is the exact ones among them per minute of the whole.

The models are `pocket` with running prose and R256, random weights with random tokens; `--model` or
`--shape` takes another one alone. Lengths are 30, 60 and 90 % of the model's mean exact horizon
(`--horizon`). RESULT has `ratio`, the smallest ratio of rates over the lengths at which they finish
anything, and `ratio_hard`, the largest over the models of that at the longest length at which they
finish at least one passage in eight. Lengths that they never finish are named, and have no ratio.
`--quick` takes lengths of which theirs finishes something within 160 steps a passage, and no more
steps than that, which is in its favour.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import arguments, median_and_spread, report
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import PRESETS, Recipe
from memvec.cramming.starts import start_vectors
from memvec.decoding import decode_ids
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from models import SHAPES, random_model
from texts import passages_of, random_tokens

# Mean exact horizon, tokens: one vector, 400 steps (README), 800 steps (docs/log.md).
HORIZONS = {"pocket": 77, "r256": 22}
SHARES = (0.3, 0.6, 0.9)
QUICK = {"pocket": ((0.2,), 2), "r256": ((0.73,), 7)}  # shares, passages on their side
QUICK_STEPS = 160  # of theirs, not 5000: what they would never finish costs them less
PAPER = PRESETS["paper"]


def as_published(lm: FrozenLM, passage: Passage, steps: int) -> tuple[bool, int]:
    """One passage by the published loop; whether its vector decodes exactly, and its steps."""
    ids = torch.tensor([passage.ids], device=lm.device)
    (start,) = start_vectors(lm, [passage.ids], 1, PAPER)
    memory = torch.nn.Parameter(start.to(lm.device))
    optimizer = torch.optim.AdamW(
        [memory],
        lr=PAPER.lr,
        betas=(PAPER.beta1, PAPER.beta2),
        weight_decay=PAPER.weight_decay,
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
    (decoded,) = decode_ids(
        lm, kept[None], [len(passage)], start="first-token", first=[passage.ids[0]]
    )
    return tuple(decoded) == passage.ids, taken


def rates(
    lm: FrozenLM, passages: list[Passage], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both sides over the same passages: a row of ours and a row of the paper's."""
    batch_size = min(32, len(passages))
    list(Engine(lm, Recipe(steps=2), batch_size=batch_size).run(passages))
    as_published(lm, passages[-1], 2)  # first-use costs of kernels are nobody's
    engine = Engine(lm, Recipe(), batch_size=batch_size)
    began = time.perf_counter()
    outcomes = list(engine.run(passages))
    seconds = time.perf_counter() - began
    exact = sum(outcome.exact for outcome in outcomes)
    ours = 60 * exact / seconds
    each, finished, moves = [], 0, []
    for passage in passages[: options.theirs]:
        began = time.perf_counter()
        right, steps = as_published(lm, passage, options.steps)
        each.append(time.perf_counter() - began)
        finished += right
        moves.append(steps)
    theirs = 60 * finished / sum(each)
    return [
        {
            "side": "ours",
            "n": len(passages),
            "exact": exact,
            "exact_per_minute": ours,
            "median_steps": median_and_spread([o.steps for o in outcomes])[0],
            "median_s": seconds / len(passages),
            "low_s": math.nan,
            "high_s": math.nan,
            "ratio": ours / theirs if theirs else math.nan,
        },
        {
            "side": "paper",
            "n": len(each),
            "exact": finished,
            "exact_per_minute": theirs,
            "median_steps": median_and_spread(moves)[0],
            **dict(zip(("median_s", "low_s", "high_s"), median_and_spread(each), strict=True)),
            "ratio": math.nan,
        },
    ]


def main() -> None:
    """Both sides at each length of each model."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(model=None)
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model")
    parser.add_argument("--horizon", type=float, help="of another model: its mean, in tokens")
    parser.add_argument("--shares", type=float, nargs="+", help="lengths as shares of the horizon")
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--theirs", type=int, default=16, help="passages on the paper's side")
    parser.add_argument("--steps", type=int, default=PAPER.steps, help="most steps of the paper's")
    options = parser.parse_args()
    if options.quick:
        options.passages, options.steps = 16, QUICK_STEPS
    rows: list[dict[str, Any]] = []
    hard: list[float] = []
    for name in [m for m in (options.model, options.shape) if m] or list(HORIZONS):
        horizon = options.horizon or HORIZONS.get(name)
        if horizon is None:
            parser.error(f"no horizon is known for {name}: give --horizon, in tokens")
        lm = random_model(name) if name in SHAPES else load_lm(name)
        texts = random_tokens if lm.tokenizer is None else passages_of
        shares = SHARES
        if options.quick:
            shares, options.theirs = QUICK.get(name, QUICK["pocket"])
        shares = options.shares or shares
        hardest = math.nan
        for share in sorted(shares):
            T = max(2, round(share * horizon))
            both = rates(lm, texts(lm, options.passages, T), options)
            rows += [{"model": name, "tokens": T, "share_of_horizon": share, **r} for r in both]
            ours, theirs = both
            if not theirs["exact"]:
                print(f"{name}, {T} tokens: the paper's recipe finishes none of {theirs['n']}")
            elif theirs["exact"] >= theirs["n"] / 8:
                hardest = ours["ratio"]  # lengths rise: the last one is the hardest
        hard.append(hardest)
    report(
        "exact",
        rows,
        options,
        ratio=min((r["ratio"] for r in rows if not math.isnan(r["ratio"])), default=math.nan),
        ratio_hard=max((h for h in hard if not math.isnan(h)), default=math.nan),
    )


if __name__ == "__main__":
    main()
