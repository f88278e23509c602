"""How much does a change of the recipe save? Forward-backward tokens until exact, side by side.

    python benchmarks/recipes.py --quick
    python benchmarks/recipes.py --corpus novels.parquet --set optimizer=nadam

The same passages by the default recipe and by the same with the fields of `--set` changed, from
noise unless `--start` says otherwise. RESULT `ratio` is the tokens that the changed recipe spends
over those of the default one at the greatest length, ratio of the means over passages, with its
95 % bootstrap interval over them, and `exact` the smaller share of exact passages.

`--quick` is a tiny random-weight model, and its RESULT is for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import arguments, report, run, with_ends
from memvec.cli.common import recipe_of
from memvec.loading import load_lm
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_means
from models import SHAPES, random_model
from texts import overlapping, passages_of
from usable import crammed


def main() -> None:
    """Every length, both recipes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--corpus", type=Path, help="held-out texts; default: our own prose")
    parser.add_argument("--tokens", type=int, nargs="+", default=(32, 56))
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--start", default="noise", help="of both recipes")
    parser.add_argument("--set", nargs="+", default=["optimizer=nadam"], help="name=value")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.tokens, options.passages = "tiny-llama", (3, 6), 4
    lm = random_model(options.shape) if options.shape else load_lm(options.model)
    both: dict[str, Any] = {"steps": options.steps, "start": options.start}
    recipes = {
        name: recipe_of("default", changes, **both)
        for name, changes in (("default", []), (" ".join(options.set), options.set))
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, float] = {}
    for T in sorted(options.tokens):
        texts = passages_of(lm, options.passages, T, corpus=options.corpus)
        passages = [Passage(text.ids, i) for i, text in enumerate(texts)]
        by_document = [
            crammed(lm, passages, r, options.vectors, len(passages)) for r in recipes.values()
        ]
        by_recipe = [[outcomes[i] for i in range(len(passages))] for outcomes in by_document]
        spent = [[outcome.spent for outcome in outcomes] for outcomes in by_recipe]
        ratio, low, high = ratio_of_means(spent[1], spent[0])
        exact = [sum(outcome.exact for outcome in outcomes) for outcomes in by_recipe]
        for name, outcomes, tokens, right in zip(recipes, by_recipe, spent, exact, strict=True):
            rows.append(
                {
                    "model": lm.name,
                    "tokens": T,
                    "vectors": options.vectors,
                    "recipe": name,
                    "n": len(outcomes),
                    "overlap": overlapping(texts),
                    "exact": right,
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
    run(main)
