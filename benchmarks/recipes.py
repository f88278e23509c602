"""How much does a change of the recipe save? Forward-backward tokens of the two recipes.

    python benchmarks/recipes.py --quick
    python benchmarks/recipes.py --corpus novels.parquet --set optimizer=nadam

The same passages are crammed by the default recipe and by a recipe in which `--set` changes fields,
both from noise unless `--start` says otherwise.

The table has a row for each length and recipe: exact passages of n, mean steps, mean
forward-backward tokens of a passage (`spent`), and their ratio to those of the default recipe with
its 95 % interval (`low`, `high`). `overlap` counts passages that share tokens with another one.

RESULT is for the greatest length: `ratio` is the mean tokens spent with the changed recipe divided
by those with the default one, with its paired 95 % bootstrap interval over passages (`ratio_low`,
`ratio_high`); below 1 the change saves tokens. `exact` is the smaller share of exact passages.

`--quick` has a tiny model with random weights, and 4 passages of 3 and of 6 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import arguments, report, with_ends
from memvec.cli.common import recipe_of
from memvec.cli.program import run_program
from memvec.loading import load_lm
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_means
from models import SHAPES, random_model
from texts import overlapping, passages_of
from usable import crammed


def main() -> None:
    """Cram the passages of every length by both recipes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument(
        "--corpus", type=Path, help="parquet file of texts; default: examples/harbour.txt"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(32, 56), help="lengths of passages"
    )
    parser.add_argument("--vectors", type=int, default=1, help="of each passage (K)")
    parser.add_argument("--passages", type=int, default=16, help="of each length")
    parser.add_argument("--steps", type=int, default=600, help="step limit of a passage")
    parser.add_argument("--start", default="noise", help="start of both recipes")
    parser.add_argument(
        "--set", nargs="+", default=["optimizer=nadam"], help="changed fields, name=value"
    )
    options = parser.parse_args()
    if options.quick:
        options.shape, options.tokens, options.passages = "tiny-llama", (3, 6), 4
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    common_fields: dict[str, Any] = {"steps": options.steps, "start": options.start}
    recipes = {
        name: recipe_of("default", changes, **common_fields)
        for name, changes in (("default", []), (" ".join(options.set), options.set))
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, float] = {}
    for T in sorted(options.tokens):
        texts = passages_of(lm, options.passages, T, corpus=options.corpus)
        passages = [Passage(text.ids, i) for i, text in enumerate(texts)]
        by_document = [
            crammed(lm, passages, recipe, options.vectors, len(passages))
            for recipe in recipes.values()
        ]
        by_recipe = [[outcomes[i] for i in range(len(passages))] for outcomes in by_document]
        spent = [[outcome.spent for outcome in outcomes] for outcomes in by_recipe]
        ratio, low, high = ratio_of_means(spent[1], spent[0])
        exact = [sum(outcome.exact for outcome in outcomes) for outcomes in by_recipe]
        for name, outcomes, tokens, exact_count in zip(
            recipes, by_recipe, spent, exact, strict=True
        ):
            rows.append(
                {
                    "model": lm.name,
                    "tokens": T,
                    "vectors": options.vectors,
                    "recipe": name,
                    "n": len(outcomes),
                    "overlap": overlapping(texts),
                    "exact": exact_count,
                    "steps": sum(outcome.steps for outcome in outcomes) / len(outcomes),
                    "spent": sum(tokens) / len(outcomes),
                }
            )
        rows[-1] |= {"ratio": ratio, "low": low, "high": high}
        rows[-2] |= {"ratio": 1.0, "low": 1.0, "high": 1.0}
        result = with_ends("ratio", (ratio, low, high))
        result["exact"] = min(exact) / len(passages)
    report("recipes", rows, options, **result)


if __name__ == "__main__":
    run_program(main)
