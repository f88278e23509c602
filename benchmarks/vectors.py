"""Do K vectors hold K times as much as one? The exact horizon per vector for K = 1 to 16.

    python benchmarks/vectors.py --quick

Passages of K times `--tokens` tokens, longer than any horizon, are crammed by the default recipe.
The horizon is decoded freely from the vectors as stored. Each K runs twice: with an equal number of
steps for every K, and until a passage has made no progress for `--patience` steps ('convergence').
K whose passages do not fit the model's context are left out, and a line says so.

The table has a row for each K and way to stop: the horizon per vector in tokens (mean over n
passages with its 95 % bootstrap interval, median, 10th and 90th percentile), how many horizons end
with the passage (`at_end`), and how many passages share tokens with another one (`overlap`).

RESULT `per_vector` is the mean horizon per vector at the largest K divided by that at the smallest
K, at convergence; `per_vector_steps` is the same after equal steps. Each has its 95 % bootstrap
interval (`_low`, `_high`). Different K have different passages of the same text, so their means are
resampled separately.

`--quick` has a tiny model with random weights, K = 1 and 16, and 3 passages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import arguments, report, save_figure, summary, with_ends
from memvec.cli.common import recipe_of
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_separate_means
from models import SHAPES, random_model
from texts import overlapping, passages_of

FOREVER = 10**6  # steps, or positions: more than any run has


def horizons(
    lm: FrozenLM, recipe: Recipe, K: int, passages: list[Passage], options: Any
) -> list[float]:
    """Horizon per vector of each passage, in tokens."""
    engine = Engine(lm, recipe, vectors=K, batch_size=min(options.batch_size, options.passages))
    outcomes = list(engine.run(passages))
    return [outcome.metrics.horizon / K for outcome in outcomes]


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the horizon per vector against K."""
    for until in dict.fromkeys(row["until"] for row in rows):
        points = [row for row in rows if row["until"] == until]
        interval = [
            [row["mean"] - row["low"] for row in points],
            [row["high"] - row["mean"] for row in points],
        ]
        axes[0].errorbar(
            [row["vectors"] for row in points],
            [row["mean"] for row in points],
            interval,
            marker="o",
            label=until,
        )
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("vectors")
    axes[0].set_ylabel("exact horizon per vector, tokens")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()


def main() -> None:
    """Measure every K with both ways to stop."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=(1, 2, 4, 8, 16), help="numbers K"
    )
    parser.add_argument("--tokens", type=int, default=120, help="of a passage, per vector")
    parser.add_argument("--passages", type=int, default=8, help="of each K")
    parser.add_argument("--batch-size", type=int, default=8, help="slots of a batch")
    parser.add_argument("--steps", type=int, default=400, help="of the runs with equal steps")
    parser.add_argument("--patience", type=int, default=300, help="steps without progress")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the recipe, name=value")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.vectors, options.tokens = "tiny-llama", (1, 16), 12
        options.passages, options.steps, options.patience = 3, 100, 100
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    changed_recipe = recipe_of("default", options.set)
    recipes = {
        f"{options.steps} steps": replace(changed_recipe, steps=options.steps, patience=FOREVER),
        "convergence": replace(changed_recipe, steps=FOREVER, patience=options.patience),
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
        for until, recipe in recipes.items():
            per_vector[until, K] = horizons(lm, recipe, K, passages, options)
            rows.append(
                {
                    "model": lm.name,
                    "vectors": K,
                    "until": until,
                    "tokens": T,
                    "overlap": overlapping(passages),
                    **summary(per_vector[until, K]),
                    "at_end": sum(horizon * K >= T for horizon in per_vector[until, K]),
                }
            )
    save_figure(options.out / "vectors", lambda axes: draw(axes, rows), 1)
    result: dict[str, float] = {}
    for until, name in zip(recipes, ("per_vector_steps", "per_vector"), strict=True):
        at_largest, at_smallest = per_vector[until, max(fitting)], per_vector[until, min(fitting)]
        result |= with_ends(name, ratio_of_separate_means(at_largest, at_smallest))
    if options.quick:
        print(f"--quick: {lm.name}, {max(fitting)} vectors at most, {options.steps} steps")
    report("vectors", rows, options, **result)


if __name__ == "__main__":
    run_program(main)
