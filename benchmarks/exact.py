"""Exact passages per minute at fixed lengths, against the paper's recipe as its code runs it.

    python benchmarks/exact.py --quick

Both sides are timed end to end by the wall clock, certification by free-running decoding included.
Ours: all passages through one engine under the default recipe, first token counted, its margin.
Theirs: the recipe of Kuratov et al. one passage at a time in the plain loop of its publication
(whole logits, torch's AdamW, loss and accuracy fetched at each step, first token handed over);
loading the model twice for each passage, which that code does as well, is left out. `--theirs`
passages stand for all on their side, because most of their time goes into passages that never
finish; their rate is the exact ones among them per minute of the whole.

Lengths are 30, 60 and 90 % of `--horizon`, the mean exact horizon of the model (README). RESULT has
`ratio`, the smallest ratio of rates over the lengths at which they finish anything, and
`ratio_hard`, that at the longest length at which they finish at least one passage in eight. Lengths
that they never finish are in the table, without a ratio. `--quick` takes 30 and 37 %, and gives
their side 2 passages of at most 400 steps.
"""

from __future__ import annotations

import math
import time

import torch
from torch.nn.functional import cross_entropy

from common import arguments, median_and_spread, report
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import PRESETS, Recipe
from memvec.cramming.start import start_vectors
from memvec.decoding import decode_ids
from memvec.lm import FrozenLM, load_lm
from memvec.passages.passage import Passage
from models import SHAPES, random_model
from texts import passages_of, random_tokens

POCKET_HORIZON = 77  # tokens, one vector, natural text, 400 steps (README)
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


def main() -> None:
    """Both sides at each length."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--horizon", type=float, default=POCKET_HORIZON)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.3, 0.6, 0.9))
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--theirs", type=int, default=16, help="passages on the paper's side")
    parser.add_argument("--steps", type=int, default=PAPER.steps, help="most steps of the paper's")
    options = parser.parse_args()
    if options.quick:
        options.passages, options.theirs, options.steps = 16, 2, 400
        options.shares = (0.3, 0.37)
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    rows, ratios, hard = [], [], math.nan
    for share in options.shares:
        T = max(2, round(share * options.horizon))
        texts = random_tokens if options.shape else passages_of
        passages = texts(lm, options.passages, T)
        list(Engine(lm, Recipe(steps=2), seats=min(32, options.passages)).run(passages))
        as_published(lm, passages[-1], 2)  # first-use costs of kernels are nobody's
        engine = Engine(lm, Recipe(), seats=min(32, options.passages))
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
        common = {"tokens": T, "share_of_horizon": share}
        rows += [
            {
                **common,
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
                **common,
                "side": "paper",
                "n": len(each),
                "exact": finished,
                "exact_per_minute": theirs,
                "median_steps": median_and_spread(moves)[0],
                **dict(zip(("median_s", "low_s", "high_s"), median_and_spread(each), strict=True)),
                "ratio": math.nan,
            },
        ]
        if finished:
            ratios.append(ours / theirs)
            if finished >= len(each) / 8:
                hard = ours / theirs  # lengths rise: the last one is the hardest
        else:
            print(f"{T} tokens: the paper's recipe finishes none of {len(each)} passages")
    report("exact", rows, options, ratio=min(ratios, default=math.nan), ratio_hard=hard)


if __name__ == "__main__":
    main()
