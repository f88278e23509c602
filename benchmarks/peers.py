"""Run the two published programs and memvec on the same token ids and the same loaded model.

    python benchmarks/peers.py --seed hidden_capacity --progressive progressive_cramming

`--seed` is a checkout of github.com/yurakuratov/hidden_capacity (Kuratov et al.), `--progressive`
is one of github.com/FusionBrainLab/progressive_cramming (Tarasov et al.). Either can be left out.
`peers_programs.py` runs the code in these checkouts. The programs get token ids instead of texts,
and a loaded model instead of a name to load (hidden_capacity loads its model twice for each
passage): both save them time.

Each program runs with its own defaults and float32 weights on one device. On a CPU that is fast in
bfloat16, memvec computes steps in bfloat16 and certifies in float32. A passage has at most
`--steps` steps. The published programs run at each of several learning rates, memvec from noise
and, where the model has one, from its one-pass encoder. memvec crams all passages in one batch,
hidden_capacity one at a time, and progressive_cramming runs in both ways. Times are those of the
wall clock, or processor time on a CPU with OMP_NUM_THREADS=1.

There are two measurements, with a row of the table for each program and setting:

- *Fixed length* (`--tokens`): `exact` counts the passages that free-running decoding of memvec
  gives back from the vectors that the program returns, and `exact_per_minute` is their rate.
  `complete` counts the passages that are complete by the program's own teacher-forced measure.
  hidden_capacity is given the first token, as in its code.
- *Horizon* (`--long`): the mean number of leading tokens that decode freely, with its 95 % interval
  (`low`, `high`, bootstrap over n passages), and `reached`, the mean number by the program's own
  measure. The whole passage is decoded, also beyond what was reached. hidden_capacity has no
  horizon, because it crams fixed lengths.

`s_a_passage` is the mean seconds of a passage, and `overlap` counts passages that share tokens.

RESULT compares memvec from noise with the best row of each program, chosen afterwards: `ratio_seed`
and `ratio_progressive` are ratios of exact passages per minute at the fixed length, `ratio_horizon`
is the horizon of memvec over that of progressive_cramming, each with its 95 % bootstrap interval
(`_low`, `_high`). `time_horizon` is the seconds per passage of progressive_cramming in the horizon
measurement over those of memvec. A program that is left out has no ratio.

`--quick` has 2 short passages and 60 steps.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import arguments, clock, report, summary, with_ends
from exact import Trial, per_minute, ratio_of_rates
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids, first_error
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_means
from models import SHAPES, random_model
from peers_programs import Answer, by_progressive, by_seed
from texts import overlapping, passages_of

SEED_RATES = (0.01, 0.1, 0.5)
PROGRESSIVE_RATES = (0.1, 0.5)  # those of its publication


def horizons(lm: FrozenLM, passages: list[Passage], answers: list[Answer], given: int) -> list[int]:
    """The horizon of each passage, in tokens, from the vectors of its answer.

    `given` is 1 if decoding starts with the passage's first token, else 0.
    """
    vectors = torch.stack([answer.vectors.to(lm.device) for answer in answers])
    first = [p.ids[0] for p in passages] if given else None
    start = "first-token" if given else "vectors"
    decoded = decode_ids(lm, vectors, [len(p) for p in passages], start_rule=start, first=first)
    errors = [first_error(ids, p.ids) for ids, p in zip(decoded, passages, strict=True)]
    return [len(p) if error is None else error for p, error in zip(passages, errors, strict=True)]


def by_us(
    lm: FrozenLM, passages: list[Passage], start: str, steps: int
) -> tuple[list[Answer], list[int]]:
    """(answers of the default recipe of memvec, their horizons in tokens)."""
    engine = Engine(lm, Recipe(start=start, steps=steps), batch_size=len(passages))
    began = clock()
    outcomes = sorted(engine.run(passages), key=lambda outcome: outcome.passage.document)
    seconds = (clock() - began) / len(passages)
    answers = [Answer(o.vectors, o.metrics.horizon, o.steps, seconds) for o in outcomes]
    return answers, [outcome.metrics.horizon for outcome in outcomes]


@dataclass(frozen=True)
class Row:
    """Results of one program with its settings, for all passages of a measurement.

    `horizon` and `reached` are numbers of tokens, one for each passage.
    """

    program: str
    settings: str
    trials: list[Trial]
    horizon: list[int]
    reached: list[int]

    def record(self, passages: list[Passage]) -> dict[str, Any]:
        """The row of the table, with means over passages."""
        horizon = summary([float(h) for h in self.horizon])
        T = len(passages[0])
        return {
            "tokens": T,
            "program": self.program,
            "settings": self.settings,
            "n": len(passages),
            "overlap": overlapping(passages),
            "complete": sum(reached >= T for reached in self.reached),
            "exact": sum(t.exact for t in self.trials),
            "exact_per_minute": per_minute(self.trials),
            "horizon": horizon["mean"],
            "low": horizon["low"],
            "high": horizon["high"],
            "reached": sum(self.reached) / len(self.reached),
            "s_a_passage": sum(t.seconds for t in self.trials) / len(self.trials),
        }


def row_of(
    program: str, settings: str, passages: list[Passage], answers: list[Answer], decoded: list[int]
) -> Row:
    """Make a row of answers and their decoded horizons, and print it on one line of stderr."""
    trials = [
        Trial(h >= len(p), a.steps, a.seconds, {})
        for p, a, h in zip(passages, answers, decoded, strict=True)
    ]
    row = Row(program, settings, trials, decoded, [answer.reached for answer in answers])
    seconds = [round(t.seconds, 1) for t in trials]
    print(f"{program}, {settings}: {decoded} tokens, {seconds} s", file=sys.stderr, flush=True)
    return row


def our_rows(lm: FrozenLM, passages: list[Passage], steps: int) -> list[Row]:
    """The rows of memvec: from noise, and then from the encoder if the model has one."""
    starts = ["noise"] + (["encoder"] if lm.encoder is not None else [])
    return [
        row_of("memvec", start, passages, *by_us(lm, passages, start, steps)) for start in starts
    ]


def at_fixed_length(
    lm: FrozenLM, passages: list[Passage], options: argparse.Namespace
) -> list[Row]:
    """Rows of all programs for the same passages of one length."""
    rows = our_rows(lm, passages, min(Recipe().steps, options.steps))
    for lr in SEED_RATES if options.seed else ():
        answers = by_seed(lm, passages, options.seed, lr, min(5000, options.steps))
        decoded = horizons(lm, passages, answers, given=1)
        rows.append(row_of("hidden_capacity", f"lr {lr:g}", passages, answers, decoded))
    for lr in PROGRESSIVE_RATES if options.progressive else ():
        for batch in (1, len(passages)):
            answers = by_progressive(
                lm,
                passages,
                options.progressive,
                "FullCrammingTrainer",
                batch,
                learning_rate=lr,
                max_optimization_steps_per_sample=options.steps,
            )
            decoded = horizons(lm, passages, answers, given=0)
            settings = f"full, lr {lr:g}, batch {batch}"
            rows.append(row_of("progressive_cramming", settings, passages, answers, decoded))
    return rows


def at_horizon(lm: FrozenLM, passages: list[Passage], options: argparse.Namespace) -> list[Row]:
    """Rows of the programs whose length grows, for passages longer than any program reaches."""
    rows = our_rows(lm, passages, min(Recipe().steps, options.steps))
    low_dim = {"low_dim_projection": True, "low_dim_size": 256}
    variants: tuple[tuple[str, dict[str, Any]], ...] = (("", {}), (", low-dim 256", low_dim))
    for lr in PROGRESSIVE_RATES if options.progressive else ():
        for name, changes in variants:
            answers = by_progressive(
                lm,
                passages,
                options.progressive,
                "ProgressiveCrammingTrainer",
                1,
                learning_rate=lr,
                progressive_train=True,
                max_optimization_steps_per_sample=options.steps,
                **changes,
            )
            # The whole passage is decoded, as for memvec: tokens beyond `reached` count, too.
            decoded = horizons(lm, passages, answers, given=0)
            settings = f"progressive, lr {lr:g}{name}"
            rows.append(row_of("progressive_cramming", settings, passages, answers, decoded))
    return rows


def result_of(fixed: list[Row], long: list[Row]) -> dict[str, float]:
    """The numbers of the RESULT line: memvec from noise and the best row of each program."""
    ratios: dict[str, tuple[float, float, float]] = {}
    for name, program in (("seed", "hidden_capacity"), ("progressive", "progressive_cramming")):
        rows = [row for row in fixed if row.program == program]
        if any(per_minute(row.trials) for row in rows):
            best = max(rows, key=lambda row: per_minute(row.trials))
            ratios[f"ratio_{name}"] = ratio_of_rates(fixed[0].trials, best.trials)
    result: dict[str, float] = {}
    growing_rows = [row for row in long if row.program != "memvec"]
    if growing_rows:
        best = max(growing_rows, key=lambda row: sum(row.horizon))
        ratios["ratio_horizon"] = ratio_of_means(
            *([float(h) for h in row.horizon] for row in (long[0], best))
        )
        seconds = [sum(t.seconds for t in row.trials) for row in (best, long[0])]
        result["time_horizon"] = seconds[0] / seconds[1]
    for name, value in ratios.items():
        result |= with_ends(name, value)
    return result


def main() -> None:
    """Take both measurements, with the programs that are given."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seed", type=Path, help="checkout of hidden_capacity")
    parser.add_argument("--progressive", type=Path, help="checkout of progressive_cramming")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--passages", type=int, default=8, help="of each measurement")
    parser.add_argument("--tokens", type=int, default=32, help="length of the first measurement")
    parser.add_argument(
        "--long",
        type=int,
        default=96,
        help="tokens of the second one, more than any program reaches",
    )
    parser.add_argument("--steps", type=int, default=10_000, help="step limit of a passage")
    options = parser.parse_args()
    for name, path in (("seed", "train.py"), ("progressive", "src/progressive_cramming")):
        folder = getattr(options, name)
        if folder is not None and not (folder / path).exists():
            parser.error(f"--{name} {folder} has no {path}: give a checkout of that program")
    if options.quick:
        options.passages, options.tokens, options.long, options.steps = 2, 8, 16, 60
    lm = random_model(options.shape) if options.shape else load_lm(options.model, dtype="float32")
    both = []
    for measure, T in ((at_fixed_length, options.tokens), (at_horizon, options.long)):
        selected = passages_of(lm, options.passages, T)
        passages = [Passage(p.ids, i, p.offset) for i, p in enumerate(selected)]
        # The first use of a kernel takes longer, so it is not timed.
        list(Engine(lm, Recipe(steps=2), batch_size=len(passages)).run(passages))
        both.append((measure(lm, passages, options), passages))
    rows = [row.record(passages) for measured, passages in both for row in measured]
    report("peers", rows, options, **result_of(both[0][0], both[1][0]))


if __name__ == "__main__":
    run_program(main)
