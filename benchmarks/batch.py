"""Exact passages per minute: all passages in one batch, compared with one passage at a time.

    python benchmarks/batch.py --quick

In each round, the same passages (default: 32 of 8 tokens) are crammed twice by the default recipe,
once in one batch with a slot for each and once with a single slot. The time is that of the wall
clock and includes certification. The table has a row for each run: passages that became exact,
seconds, optimiser steps (summed over passages) and exact passages per minute.

RESULT `ratio` is exact passages per minute in one batch divided by those in one slot: the median
over rounds, with the 10th and the 90th percentile (`low`, `high`).

`--quick` has 2 rounds instead of 5, which take twenty seconds each on one idle core.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from common import arguments, report
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import median_and_spread
from texts import passages_of


class Measured(NamedTuple):
    """One run of the engine over all passages, certification included."""

    exact_per_minute: float
    exact: int  # passages
    seconds: float
    steps: int  # optimiser steps, summed over passages


def measure(lm: FrozenLM, passages: list[Passage], batch_size: int, steps: int) -> Measured:
    """Cram the passages in batches of `batch_size`, with at most `steps` steps each."""
    engine = Engine(lm, Recipe.of("default", steps=steps), batch_size=batch_size)
    began = time.perf_counter()
    outcomes = list(engine.run(passages))
    seconds = time.perf_counter() - began
    exact = sum(outcome.exact for outcome in outcomes)
    total_steps = sum(outcome.steps for outcome in outcomes)
    return Measured(60 * exact / seconds, exact, seconds, total_steps)


def main() -> None:
    """Run both batch sizes by turns on the same passages."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each passage")
    parser.add_argument("--passages", type=int, default=32, help="in each round")
    parser.add_argument("--rounds", type=int, default=5, help="each with other passages")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    lm = load_lm(options.model)
    texts = passages_of(lm, options.passages * (rounds + 1), options.tokens)
    measure(lm, texts[-4:], 4, 5)  # the first use of a kernel takes longer, so it is not timed
    rows, ratios = [], []
    for r in range(rounds):
        part = texts[r * options.passages : (r + 1) * options.passages]
        rates = {}
        for batch_size in (options.passages, 1) if r % 2 == 0 else (1, options.passages):
            measured = measure(lm, part, batch_size, steps=300)
            rates[batch_size] = measured.exact_per_minute
            rows.append(
                {
                    "round": r,
                    "batch_size": batch_size,
                    "tokens": options.tokens,
                    "passages": len(part),
                    "exact": measured.exact,
                    "seconds": measured.seconds,
                    "steps": measured.steps,
                    "exact_per_minute": measured.exact_per_minute,
                }
            )
        if not rates[1]:
            raise MemvecError(
                "no passage was exact in one slot, so there is no ratio: lower --tokens."
            )
        ratios.append(rates[options.passages] / rates[1])
    median, low, high = median_and_spread(ratios)
    report("batch", rows, options, ratio=median, low=low, high=high)


if __name__ == "__main__":
    run_program(main)
