"""How long is the exact horizon for what a recipe spends? memvec and published recipes.

    python benchmarks/horizon.py --quick
    python benchmarks/horizon.py --cases pocket-natural --corpus novels.parquet
    python benchmarks/horizon.py --cases r256 --published alignment geometric progressive --each

The horizon of a passage is the number of leading tokens that free-running decoding gives back from
the vectors as stored, and whose margins are at least those that the recipe requires. Here the
default recipe requires a margin of at least `--margin` (0.5 logits), the recipe `margin` 0.5 logits
as published, and the other published recipes 0 (with `--same-margin` that of the default).
Passages are longer than any recipe reaches; `at_end` counts horizons that end with the passage.

The cost is counted in forward-backward tokens of the passage: at each step the positions that count
in the loss plus the inputs in front of them, and the tokens of an encoder's pass. A forward pass
without a backward pass counts half. The published recipes grow by stages (one token, or the next
target length of `geometric`), and each stage ends with a forward pass in which all its tokens are
right; this pass is counted. `alignment` has in addition a forward pass over the text without
vectors, for each token that it reaches.

The default recipe runs from noise, as all published recipes do, and from the model's one-pass
encoder where the model has one; `--set` changes the recipe. Each published recipe runs at each of
several learning rates. Models compute in float32 on any device (`--dtype`), so that the horizons do
not depend on the device.

The paper's recipe crams passages of a fixed length, so the longest length of each passage is
searched, and the search counts in the cost: lengths of 2, 4, 8 ... predicted tokens, each crammed
anew until it is exact or the recipe gives up, until one fails; then bisection between the longest
length that became exact and the shortest that failed. The horizon at a cost is the longest length
that was exact by then.

The table has a row for each budget of each case: mean horizons in tokens with 95 % intervals
(bootstrap over n passages) of the default from noise and from the encoder, of the best published
recipe at that budget (of all recipes and rates, chosen afterwards) and of the paper's at its best
rate, and ratios of means with paired 95 % bootstrap intervals. With `--each` it has a row for each
recipe, rate and budget.

RESULT has the smallest ratio over all budgets of all cases (the tiny models are only in the table),
with its interval (`_low`, `_high`) and its budget (`_budget`): `ratio` is the default from noise
over the paper's recipe, `ratio_published` the default from noise over the best published recipe,
`ratio_published_encoder` the default from the encoder over the best published recipe, which starts
from noise. `apart` is 1 if the intervals of the default from noise and of the best published recipe
overlap at no budget of any case.

`--quick` has 4 passages of two cases, small budgets and two published recipes. All cases and
recipes take hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from at_costs import fixed, growing
from common import arguments, report, save_figure, summary, with_ends
from memvec.cli.common import recipe_of
from memvec.cli.program import run_program
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.large import layers_of
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_means
from models import random_model
from texts import passages_of, random_tokens, random_words

# Published recipe → its learning rates. The publication of the growing recipes uses 0.1 and 0.5,
# and the largest rate that it tried is 1. The paper's rate is 0.01.
SWEEP = {
    "progressive": (0.1, 0.5, 1.0),
    "temperature": (0.1, 0.5, 1.0),
    "margin": (0.1, 0.5, 1.0),
    "low-dim 256": (0.1, 0.5, 1.0),
    "low-dim 32": (0.1, 0.5, 1.0),
    "alignment": (0.1, 0.5, 1.0),
    "alignment low-dim 256": (0.1, 0.5, 1.0),
    "geometric": (0.1, 0.5, 1.0),
    "paper": (0.01, 0.1, 0.5),
}
OURS, OURS_ENCODER, PAPER = "default, noise", "default, encoder", "paper"
CHECKPOINTS, QUICK_CHECKPOINTS = 12, 4  # evenly spaced costs at which horizons are measured

Curves = dict[str, list[list[int]]]  # recipe -> horizon of each passage at each cost


@dataclass(frozen=True)
class Case:
    """A model and a kind of text, with the length and the number of passages.

    `budget` is the cost that a passage may reach, in forward-backward tokens.
    """

    shape: str  # a name of benchmarks/models.py; "": the model that --model names
    text: Callable[[FrozenLM, int, int, argparse.Namespace], list[Passage]]
    tokens: int
    passages: int
    budget: int

    def load(self, options: argparse.Namespace) -> FrozenLM:
        """The model, on the device and in the dtype that were asked for."""
        where = {"device": options.device, "dtype": options.dtype}
        return random_model(self.shape, **where) if self.shape else load_lm(options.model, **where)


def _natural(lm: FrozenLM, n: int, T: int, options: argparse.Namespace) -> list[Passage]:
    return passages_of(lm, n, T, corpus=options.corpus)


def _words(lm: FrozenLM, n: int, T: int, options: argparse.Namespace) -> list[Passage]:
    return random_words(lm, n, T, words=options.words)


def _random(lm: FrozenLM, n: int, T: int, options: argparse.Namespace) -> list[Passage]:
    return random_tokens(lm, n, T)


# Each budget is so large that all recipes reach the same horizon, with full vectors.
CASES = {
    "pocket-natural": Case("", _natural, 128, 12, 3000),
    "pocket-words": Case("", _words, 96, 12, 1500),
    "r256": Case("r256", _random, 96, 8, 1500),
    "pythia-160m": Case("pythia-160m", _random, 96, 4, 800),
    "tiny-gpt2": Case("tiny-gpt2", _random, 48, 16, 12_000),
    "tiny-qwen3": Case("tiny-qwen3", _random, 48, 16, 12_000),
}
QUICK = {"pocket-natural": (4, 480), "pocket-words": (4, 320)}  # passages, budget
# A margin of 0.5 logits is half of the spread of the logits of these models, which makes it harder
# to reach than in others. RESULT does not have their ratios.
NOT_COUNTED = ("tiny-gpt2", "tiny-qwen3")
# The published recipes and rates that are best for short horizons.
QUICK_SWEEP = {"low-dim 256": (0.1, 0.5), "paper": (0.01, 0.1)}


def published(sweep: dict[str, tuple[float, ...]], margin: float, layers: int) -> dict[str, Recipe]:
    """Each published recipe at each of its rates, with a margin of at least `margin` logits.

    `sweep`: recipe → learning rates. `layers` is the number of layers of the model.
    """
    recipes = {}
    for name, rates in sweep.items():
        preset, *suffix = name.split()
        changes: dict[str, Any] = {}
        if suffix:
            changes = {"coordinates": "low-dim", "start": "linear", "dimensions": int(suffix[-1])}
        for lr in rates:
            recipe = Recipe.of(preset, lr=lr, **changes)
            recipe = replace(recipe, align_layers=min(recipe.align_layers, layers))
            recipes[f"{name}, lr {lr:g}"] = replace(recipe, margin=max(recipe.margin, margin))
    return recipes


def ours(lm: FrozenLM, margin: float, changes: Sequence[str] = ()) -> dict[str, Recipe]:
    """The default recipe from each start that the model has, with a margin of at least `margin`.

    `margin` is in logits. Steps and patience are unlimited, so that only the budget ends a passage.
    Steps compute in the model's own dtype, as those of the published recipes do.
    """
    recipe = recipe_of("default", list(changes), steps=10**6, patience=10**6, compute="model")
    recipe = recipe.in_logits(lm.logit_spread)
    recipe = replace(recipe, margin=max(margin, recipe.margin))
    recipes = {OURS: replace(recipe, start="noise")}
    if lm.encoder is not None:
        recipes[OURS_ENCODER] = replace(recipe, start="encoder")
    return recipes


def curves(
    lm: FrozenLM, recipes: dict[str, Recipe], passages: list[Passage], costs: list[int]
) -> Curves:
    """The horizons of all recipes, which run one after another."""
    horizons: Curves = {}
    for label, recipe in recipes.items():
        if label.startswith(PAPER):
            horizons[label] = fixed(lm, recipe, passages, costs)
        else:
            staged = label not in (OURS, OURS_ENCODER)
            horizons[label] = growing(lm, recipe, passages, costs, staged=staged)
        mean = sum(row[-1] for row in horizons[label]) / len(passages)
        print(f"{label}: {mean:.1f} tokens", file=sys.stderr, flush=True)
    return horizons


def long_rows(case: str, by_recipe: Curves, costs: list[int], T: int) -> list[dict[str, Any]]:
    """A row for each recipe and cost: the mean horizon at that cost, in tokens."""
    return [
        {
            "case": case,
            "recipe": label,
            "start": "encoder" if label == OURS_ENCODER else "noise",
            "spent": cost,
            **summary([float(row[at]) for row in horizons]),
            "at_end": sum(row[at] >= T - 1 for row in horizons),
        }
        for label, horizons in by_recipe.items()
        for at, cost in enumerate(costs)
    ]


def budget_rows(case: str, by_recipe: Curves, costs: list[int], T: int) -> list[dict[str, Any]]:
    """A row for each cost: the default, the best published recipe, and ratios of their means."""
    rows = []
    for cost_index, cost in enumerate(costs):
        at_cost = {
            label: [float(row[cost_index]) for row in horizons]
            for label, horizons in by_recipe.items()
        }
        of_published = {
            label: v for label, v in at_cost.items() if label not in (OURS, OURS_ENCODER)
        }
        of_the_paper = {label: v for label, v in of_published.items() if label.startswith(PAPER)}
        best = max(of_published, key=lambda label: sum(of_published[label]))
        best_of_the_paper = max(
            of_the_paper, key=lambda label: sum(of_the_paper[label]), default=None
        )
        row: dict[str, Any] = {"case": case, "budget": cost, "n": len(at_cost[OURS])}
        row |= {
            "noise": summary(at_cost[OURS]),
            "encoder": None,
            "published": summary(at_cost[best]),
        }
        row |= {
            "recipe": best,
            "paper": None if best_of_the_paper is None else summary(at_cost[best_of_the_paper]),
        }
        row["ratio_published"] = ratio_of_means(at_cost[OURS], at_cost[best])
        row["ratio"] = (
            None
            if best_of_the_paper is None
            else ratio_of_means(at_cost[OURS], at_cost[best_of_the_paper])
        )
        row["ratio_published_encoder"] = None
        if OURS_ENCODER in at_cost:
            row["encoder"] = summary(at_cost[OURS_ENCODER])
            row["ratio_published_encoder"] = ratio_of_means(at_cost[OURS_ENCODER], at_cost[best])
        row["at_end"] = sum(v >= T - 1 for label in (OURS, best) for v in at_cost[label])
        rows.append(row)
    return rows


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The RESULT line: the smallest ratios over all budgets and cases, and their budgets."""
    one_case = len({row["case"] for row in rows}) == 1
    counted = [row for row in rows if one_case or row["case"] not in NOT_COUNTED]
    result: dict[str, float] = {}
    for name in ("ratio", "ratio_published", "ratio_published_encoder"):
        with_ratio = [row for row in counted if row[name] is not None]
        if with_ratio:
            worst = min(with_ratio, key=lambda row: float(row[name].value))
            result |= with_ends(name, worst[name])
            result[f"{name}_budget"] = worst["budget"]
    apart = [row["noise"]["low"] > row["published"]["high"] for row in counted]
    return result | {"apart": float(all(apart))}


def _interval(value: Any, digits: int) -> str:
    """The text of a mean or a ratio with its interval; a dash for None."""
    if value is None:
        return "–"
    middle, low, high = (
        (value["mean"], value["low"], value["high"]) if isinstance(value, dict) else value
    )
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: means and ratios as text, with their intervals."""
    means, ratios = ("noise", "encoder", "published", "paper"), ("ratio", "ratio_published")
    digits = dict.fromkeys(means, 1) | dict.fromkeys((*ratios, "ratio_published_encoder"), 2)
    return {k: _interval(v, digits[k]) if k in digits else v for k, v in row.items()}


def recipe_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of --each: the mean horizon as text, with its interval."""
    named = {k: row[k] for k in ("case", "recipe", "start", "spent", "n")}
    return {**named, "horizon": _interval(row, 1), "at_end": row["at_end"]}


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A panel for each case: mean horizon with its interval against the tokens spent."""
    for axis, case in zip(axes, dict.fromkeys(row["case"] for row in rows), strict=True):
        of_case = [row for row in rows if row["case"] == case]
        for label in dict.fromkeys(row["recipe"] for row in of_case):
            points = [row for row in of_case if row["recipe"] == label]
            spent = [row["spent"] for row in points]
            line_style = "-" if label in (OURS, OURS_ENCODER) else "--" if PAPER in label else ":"
            axis.plot(spent, [row["mean"] for row in points], line_style, label=label)
            axis.fill_between(
                spent, [row["low"] for row in points], [row["high"] for row in points], alpha=0.15
            )
        axis.set_title(f"{case} (n {of_case[0]['n']})", fontsize=9)
        axis.set_xlabel("forward-backward tokens spent per passage")
        axis.set_ylabel("mean exact horizon, tokens")
        axis.set_ylim(bottom=0)
    axes[-1].legend(fontsize=6)


def options_of(arguments_given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; with --quick two")
    parser.add_argument(
        "--corpus",
        type=Path,
        help="parquet file of texts for the case pocket-natural; default: examples/harbour.txt",
    )
    parser.add_argument(
        "--words",
        type=Path,
        help="file with one word a line for pocket-words; default: those of wordfreq",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or a GPU such as cuda:0")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model"
    )
    parser.add_argument("--passages", type=int, help="of each case; default: as the case says")
    parser.add_argument(
        "--margin", type=float, default=0.5, help="smallest margin of the default recipe, in logits"
    )
    parser.add_argument(
        "--same-margin",
        action="store_true",
        help="published recipes have the margin of the default, too",
    )
    parser.add_argument(
        "--budget", type=int, help="forward-backward tokens of a passage; default: as the case says"
    )
    parser.add_argument(
        "--published",
        nargs="+",
        choices=SWEEP,
        help="published recipes; default: all; with --quick two",
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help="learning rates of all published recipes; default: those of each recipe",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], help="changes to the default recipe, name=value"
    )
    parser.add_argument(
        "--each", action="store_true", help="print a row for each recipe and budget"
    )
    return parser.parse_args(arguments_given)


def main() -> None:
    """Run the recipes side by side in each case."""
    options = options_of()
    sweep = QUICK_SWEEP if options.quick and not options.published else SWEEP
    sweep = {name: sweep[name] for name in options.published or sweep}
    if options.lr:
        sweep = dict.fromkeys(sweep, tuple(options.lr))
    rows: list[dict[str, Any]] = []
    budgets: list[dict[str, Any]] = []
    for name in options.cases or (QUICK if options.quick else CASES):
        case = CASES[name]
        count, budget = QUICK.get(name, (3, 600)) if options.quick else (case.passages, case.budget)
        count, budget = options.passages or count, options.budget or budget
        lm = case.load(options)
        drawn = case.text(lm, count, case.tokens, options)
        passages = [Passage(passage.ids, i) for i, passage in enumerate(drawn)]
        checkpoints = QUICK_CHECKPOINTS if options.quick else CHECKPOINTS
        costs = [round(budget * (i + 1) / checkpoints) for i in range(checkpoints)]
        recipes = ours(lm, options.margin, options.set)
        published_margin = recipes[OURS].margin if options.same_margin else 0.0
        recipes |= published(sweep, published_margin, len(layers_of(lm.model)))
        print(f"{name}: {len(recipes)} recipes", file=sys.stderr, flush=True)
        horizons = curves(lm, recipes, passages, costs)
        rows += long_rows(name, horizons, costs, case.tokens)
        budgets += budget_rows(name, horizons, costs, case.tokens)
    cases = len({row["case"] for row in rows})
    save_figure(options.out / "horizon", lambda axes: draw(axes, rows), cases)
    table = (
        [recipe_row(row) for row in rows] if options.each else [table_row(row) for row in budgets]
    )
    report("horizon", rows, options, table_rows=table, **compare(budgets))


if __name__ == "__main__":
    run_program(main)
