"""Exact passages per minute: 32 passages of equal length in one batch against one slot.

    python benchmarks/batch.py --quick

Both sides run the same engine with the same recipe on the same passages, end to end, certification
included; RESULT ratio is the median over rounds of the ratio of their exact passages per minute.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from common import arguments, report, run
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
    """Run both, taking turns, on the same passages."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    lm = load_lm(options.model)
    texts = passages_of(lm, options.passages * (rounds + 1), options.tokens)
    measure(lm, texts[-4:], 4, 5)  # first-use costs of kernels
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
    run(main)
