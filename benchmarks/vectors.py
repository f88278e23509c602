"""Do K vectors hold K times as much as one? Horizon per vector for K = 1 ... 16.

    python benchmarks/vectors.py --quick

Passages that grow with K, longer than any horizon, under the default recipe; horizons are decoded
freely from the vectors as stored. Each K runs twice: with an equal number of steps for every K, and
until the passage has made no progress for `--patience` steps ('convergence'). RESULT `per_vector`
is the horizon per vector at the largest K over that at K = 1 at convergence, `per_vector_steps` the
same after equal steps, each with its 95 % bootstrap interval. The passages of different K are
different ones of the same text, so the two means are resampled separately. K whose passages do not
fit the model's context are left out, and named.

`--quick` is a tiny random-weight model with K = 1 and 16, and its RESULT is for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import arguments, report, run, save_figure, summary, with_ends
from memvec.cli.common import recipe_of
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_separate_means
from models import SHAPES, random_model
from texts import overlapping, passages_of

FOREVER = 10**6


def horizons(
    lm: FrozenLM, recipe: Recipe, K: int, passages: list[Passage], options: Any
) -> list[float]:
    """Horizon per vector of each passage."""
    engine = Engine(lm, recipe, vectors=K, batch_size=min(options.batch_size, options.passages))
    outcomes = list(engine.run(passages))
    return [outcome.metrics.horizon / K for outcome in outcomes]


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Horizon per vector against K."""
    for until in dict.fromkeys(row["until"] for row in rows):
        line = [row for row in rows if row["until"] == until]
        error = [[r["mean"] - r["low"] for r in line], [r["high"] - r["mean"] for r in line]]
        axes[0].errorbar(
            [r["vectors"] for r in line], [r["mean"] for r in line], error, marker="o", label=until
        )
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("vectors")
    axes[0].set_ylabel("exact horizon per vector, tokens")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()


def main() -> None:
    """Every K, both ways to stop."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--vectors", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--tokens", type=int, default=120, help="passage length per vector")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patience", type=int, default=300)
    parser.add_argument("--set", nargs="*", default=[], help="name=value: changes to the recipe")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.vectors, options.tokens = "tiny-llama", (1, 16), 12
        options.passages, options.steps, options.patience = 3, 100, 100
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    changed = recipe_of("default", options.set)
    ways = {
        f"{options.steps} steps": replace(changed, steps=options.steps, patience=FOREVER),
        "convergence": replace(changed, steps=FOREVER, patience=options.patience),
    }
    rows, per_vector = [], {}
    context = lm.context or FOREVER
    fitting = [K for K in options.vectors if (options.tokens + 1) * K <= context]
    for K in sorted(set(options.vectors) - set(fitting)):
        print(f"{K} vectors with {options.tokens} tokens each do not fit {context} positions")
    if not fitting:
        parser.error("nothing fits the model's context: fewer --tokens")
    for K in fitting:
        T = options.tokens * K
        passages = passages_of(lm, options.passages, T)
        for until, recipe in ways.items():
            per_vector[until, K] = horizons(lm, recipe, K, passages, options)
            rows.append(
                {
                    "model": lm.name,
                    "vectors": K,
                    "until": until,
                    "tokens": T,
                    "overlap": overlapping(passages),
                    **summary(per_vector[until, K]),
                    "at_end": sum(h * K >= T for h in per_vector[until, K]),
                }
            )
    save_figure(options.out / "vectors", lambda axes: draw(axes, rows), 1)
    result: dict[str, float] = {}
    for until, name in zip(ways, ("per_vector_steps", "per_vector"), strict=True):
        at_largest, at_smallest = per_vector[until, max(fitting)], per_vector[until, min(fitting)]
        result |= with_ends(name, ratio_of_separate_means(at_largest, at_smallest))
    if options.quick:
        print(f"--quick: {lm.name}, {max(fitting)} vectors at most, {options.steps} steps")
    report("vectors", rows, options, **result)


if __name__ == "__main__":
    run(main)
