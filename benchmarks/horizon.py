"""How far does a recipe get for what it costs? Mean exact horizon against tokens spent.

    python benchmarks/horizon.py --quick
    python benchmarks/horizon.py --cases pocket-natural --corpus novels.parquet
    python benchmarks/horizon.py --cases r256 --published alignment geometric progressive --each

The horizon of a passage is the number of leading tokens that meet the margin its recipe asks for
and that free-running decoding gives back from the vectors as stored. The default is held to a
margin of at least `--margin` 0.5 logits here, `margin` asks for 0.5 as published, and the other
published recipes for 0 (`--same-margin`: for the default's). The cost is what the passage itself
needed for forward and backward passes until then, in tokens: the positions that counted at each
step, plus the vectors, and the encoder's pass; and for the published recipes half as much for the
forward pass that ends each of their stages of one token (their step is measured first and taken
only if the stage goes on; a stage of `geometric` is one of its targets). A forward pass alone costs
half of what it costs with a backward pass to the vectors. `alignment` pays so for its pass over the
plain text, once for each token that it reaches. Passages are longer than any recipe reaches;
`at_end` counts those that were not.

The default runs from both starts: noise, as all the published recipes do, and the model's one-pass
encoder where it has one; `--set` changes it. Each published recipe runs at each rate of a SWEEP.
Models are computed in float32 on any device (`--dtype`), so that a figure does not depend on it.

The paper's recipe crams passages of fixed length, so for each passage its longest length has to be
searched, and the search is part of its cost: lengths of 2, 4, 8 ... predicted tokens, each begun
afresh and given up by the recipe's own rule, until one fails; then bisection between the longest
that was completed and the shortest that failed. Its horizon at a cost is the longest length that
was completed and decoded freely by then.

The table has a row for each budget of each case: the default from both starts, the best published
recipe at that budget (best of all recipes and rates, seen afterwards), the paper's at its best
rate, and the ratios of the means with paired 95 % bootstrap intervals over passages; with `--each`,
a row for each recipe, rate and budget. RESULT has the
smallest ratio over all budgets of all cases (but for the tiny models, which are only in the table),
with its interval (`_low`, `_high`) and its budget (`_budget`): `ratio` is default from noise
to paper, `ratio_published` default from noise to best published, and `ratio_published_encoder` the
default from the encoder to the best published, which start from noise. `apart` is 1 if at each
budget of each case the intervals of the default from noise and of the best published do not
overlap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from at_costs import fixed, growing
from common import arguments, report, run, save_figure, summary, with_ends
from memvec.cli.common import recipe_of
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.large import layers_of
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import ratio_of_means
from models import random_model
from texts import passages_of, random_tokens, random_words

# Learning rates: 0.1 and 0.5 are those of the publication of the growing recipes, and 1 the largest
# of its sweep; 0.01 is the paper's.
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
    """A model and a kind of text; `tokens` is the length of its passages, `budget` the cost that
    a passage may reach, in forward-backward tokens."""

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


# Each budget ends where a model's vectors are full and all recipes have the same horizon.
CASES = {
    "pocket-natural": Case("", _natural, 128, 12, 3000),
    "pocket-words": Case("", _words, 96, 12, 1500),
    "r256": Case("r256", _random, 96, 8, 1500),
    "pythia-160m": Case("pythia-160m", _random, 96, 4, 800),
    "tiny-gpt2": Case("tiny-gpt2", _random, 48, 16, 12_000),
    "tiny-qwen3": Case("tiny-qwen3", _random, 48, 16, 12_000),
}
QUICK = {"pocket-natural": (4, 480), "pocket-words": (4, 320)}  # passages, budget
# 0.5 logits are half of the spread of these models' logits, so their ratios are not in RESULT.
NOT_COUNTED = ("tiny-gpt2", "tiny-qwen3")
QUICK_SWEEP = {"low-dim 256": (0.1, 0.5), "paper": (0.01, 0.1)}  # the best for few tokens


def published(sweep: dict[str, tuple[float, ...]], margin: float, layers: int) -> dict[str, Recipe]:
    """Each published recipe at each rate, held to a margin of at least so many logits, for a model
    of so many layers."""
    recipes = {}
    for name, rates in sweep.items():
        preset, *more = name.split()
        changes: dict[str, Any] = {}
        if more:
            changes = {"coordinates": "low-dim", "start": "linear", "dimensions": int(more[-1])}
        for lr in rates:
            recipe = Recipe.of(preset, lr=lr, **changes)
            recipe = replace(recipe, align_layers=min(recipe.align_layers, layers))
            recipes[f"{name}, lr {lr:g}"] = replace(recipe, margin=max(recipe.margin, margin))
    return recipes


def ours(lm: FrozenLM, margin: float, changes: Sequence[str] = ()) -> dict[str, Recipe]:
    """The default from each start that the model has, held to a margin of so many logits.

    It may spend the whole budget: its own limits are for daily use. In the model's own dtype, like
    the published: a margin is one on the way, too.
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
    """The horizons of all recipes, which run one after the other."""
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
    """One row per recipe and cost: the horizons of the passages at that cost, tokens."""
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
    """One row per cost: ours beside the best published there, and the ratios of the means."""
    rows = []
    for at, cost in enumerate(costs):
        at_cost = {
            label: [float(row[at]) for row in horizons] for label, horizons in by_recipe.items()
        }
        peers = {label: v for label, v in at_cost.items() if label not in (OURS, OURS_ENCODER)}
        papers = {label: v for label, v in peers.items() if label.startswith(PAPER)}
        best = max(peers, key=lambda label: sum(peers[label]))
        paper = max(papers, key=lambda label: sum(papers[label]), default=None)
        row: dict[str, Any] = {"case": case, "budget": cost, "n": len(at_cost[OURS])}
        row |= {
            "noise": summary(at_cost[OURS]),
            "encoder": None,
            "published": summary(at_cost[best]),
        }
        row |= {"recipe": best, "paper": None if paper is None else summary(at_cost[paper])}
        row["ratio_published"] = ratio_of_means(at_cost[OURS], at_cost[best])
        row["ratio"] = None if paper is None else ratio_of_means(at_cost[OURS], at_cost[paper])
        row["ratio_published_encoder"] = None
        if OURS_ENCODER in at_cost:
            row["encoder"] = summary(at_cost[OURS_ENCODER])
            row["ratio_published_encoder"] = ratio_of_means(at_cost[OURS_ENCODER], at_cost[best])
        row["at_end"] = sum(v >= T - 1 for label in (OURS, best) for v in at_cost[label])
        rows.append(row)
    return rows


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The RESULT line: the smallest ratios over all budgets and cases, and their budgets."""
    alone = len({row["case"] for row in rows}) == 1
    counted = [row for row in rows if alone or row["case"] not in NOT_COUNTED]
    result: dict[str, float] = {}
    for name in ("ratio", "ratio_published", "ratio_published_encoder"):
        at = [row for row in counted if row[name] is not None]
        if at:
            worst = min(at, key=lambda row: float(row[name].value))
            result |= with_ends(name, worst[name])
            result[f"{name}_budget"] = worst["budget"]
    apart = [row["noise"]["low"] > row["published"]["high"] for row in counted]
    return result | {"apart": float(all(apart))}


def _interval(value: Any, digits: int) -> str:
    """A mean or a ratio with its interval; a dash where there is none."""
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


def each(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the long table, its mean as text with its interval."""
    named = {k: row[k] for k in ("case", "recipe", "start", "spent", "n")}
    return {**named, "horizon": _interval(row, 1), "at_end": row["at_end"]}


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A panel per case: mean horizon and its interval against tokens spent."""
    for axis, case in zip(axes, dict.fromkeys(row["case"] for row in rows), strict=True):
        of_case = [row for row in rows if row["case"] == case]
        for label in dict.fromkeys(row["recipe"] for row in of_case):
            line = [row for row in of_case if row["recipe"] == label]
            spent = [row["spent"] for row in line]
            style = "-" if label in (OURS, OURS_ENCODER) else "--" if PAPER in label else ":"
            axis.plot(spent, [row["mean"] for row in line], style, label=label)
            axis.fill_between(
                spent, [row["low"] for row in line], [row["high"] for row in line], alpha=0.15
            )
        axis.set_title(f"{case} (n {of_case[0]['n']})", fontsize=9)
        axis.set_xlabel("forward-backward tokens spent per passage")
        axis.set_ylabel("mean exact horizon, tokens")
        axis.set_ylim(bottom=0)
    axes[-1].legend(fontsize=6)


def options_of(arguments_given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; --quick: two")
    parser.add_argument("--corpus", type=Path, help="parquet of texts for the natural case")
    parser.add_argument("--words", type=Path, help="file of words, one a line; default: wordfreq's")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:0")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--passages", type=int, help="passages per case")
    parser.add_argument("--margin", type=float, default=0.5, help="the default's least, in logits")
    parser.add_argument(
        "--same-margin", action="store_true", help="the default's margin for the published, too"
    )
    parser.add_argument("--budget", type=int, help="tokens spent per passage")
    parser.add_argument(
        "--published", nargs="+", choices=SWEEP, help="recipes; default: all; --quick: two"
    )
    parser.add_argument("--lr", type=float, nargs="+", help="their learning rates, not the sweep's")
    parser.add_argument("--set", nargs="*", default=[], help="name=value: changes to the default")
    parser.add_argument("--each", action="store_true", help="a row for each recipe and budget")
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
        n, budget = QUICK.get(name, (3, 600)) if options.quick else (case.passages, case.budget)
        n, budget = options.passages or n, options.budget or budget
        lm = case.load(options)
        texts = case.text(lm, n, case.tokens, options)
        passages = [Passage(passage.ids, i) for i, passage in enumerate(texts)]
        points = QUICK_CHECKPOINTS if options.quick else CHECKPOINTS
        costs = [round(budget * (i + 1) / points) for i in range(points)]
        recipes = ours(lm, options.margin, options.set)
        published_margin = recipes[OURS].margin if options.same_margin else 0.0
        recipes |= published(sweep, published_margin, len(layers_of(lm.model)))
        print(f"{name}: {len(recipes)} recipes", file=sys.stderr, flush=True)
        horizons = curves(lm, recipes, passages, costs)
        rows += long_rows(name, horizons, costs, case.tokens)
        budgets += budget_rows(name, horizons, costs, case.tokens)
    cases = len({row["case"] for row in rows})
    save_figure(options.out / "horizon", lambda axes: draw(axes, rows), cases)
    table = [each(row) for row in rows] if options.each else [table_row(row) for row in budgets]
    report("horizon", rows, options, table_rows=table, **compare(budgets))


if __name__ == "__main__":
    run(main)
