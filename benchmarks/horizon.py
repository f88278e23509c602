"""How far does a recipe get for what it costs? Mean exact horizon against tokens spent.

    python benchmarks/horizon.py --quick
    python benchmarks/horizon.py --cases pocket-natural --corpus novels.parquet

The horizon of a passage is the number of leading tokens that meet the margin its recipe asks for
and that free-running decoding gives back from the vectors as stored. The default is held to a
margin of at least `--margin` 0.5 logits here, `margin` asks for 0.5 as published, and the other
published recipes for 0 (`--same-margin`: for the default's). The cost is what the passage itself
had to forward and back until then, in tokens: what counted at each step, plus the vectors; and for
the published recipes half as much for the forward pass that ends each of their stages of one token
(their step is measured first and taken only if the stage goes on). Passages are longer than
anybody gets; `at_end` counts those that were not.

The paper's recipe crams passages of fixed length, so for each passage its longest length has to be
searched, and the search is part of its cost: lengths of 2, 4, 8 ... predicted tokens, each begun
afresh and given up by the recipe's own rule, until one fails; then bisection between the longest
that was completed and the shortest that failed. Its horizon at a cost is the longest length that
was completed and decoded freely by then.

`progressive`, `temperature`, `low-dim` and `margin` run at both learning rates of their
publication (and low-dim at both of its sizes); the best of all of them in a case, seen afterwards,
is the one that the default is compared with. RESULT has the smallest ratios of mean horizons over
the cases (but for the tiny models, which are shown), default to paper (`ratio`) and default to that
best one (`ratio_published`), each with its 95 % paired bootstrap interval over passages (`_low`,
`_high`), and `apart`: 1 if in each case the intervals of the means do not overlap.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import arguments, ratio_of_means, report, save_figure, summary
from memvec.cramming.certify import Outcome, positions
from memvec.cramming.engine import Engine, Job
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids, first_error
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from models import random_model
from texts import passages_of, random_tokens, random_words

PUBLISHED = {
    **{
        f"{preset} lr {lr}": Recipe.of(preset, lr=lr)
        for preset in ("progressive", "temperature", "margin")
        for lr in (0.1, 0.5)
    },
    "low-dim 256 lr 0.1": Recipe.of("low-dim", lr=0.1),
    "low-dim 256 lr 0.5": Recipe.of("low-dim", lr=0.5),
    "low-dim 32 lr 0.1": Recipe.of("low-dim", lr=0.1, dimensions=32),
}
ROUNDING = 1e-3  # logits: the same sums in another batch shape
CHECKPOINTS = 12  # evenly spaced costs at which horizons are measured


@dataclass(frozen=True)
class Case:
    """A model and a kind of text; `tokens` is the length of its passages, `budget` the cost that
    a passage may reach, in forward-backward tokens."""

    load: Callable[[], FrozenLM]
    text: Callable[[FrozenLM, int, int, Path | None], list[Passage]]
    tokens: int
    passages: int
    budget: int


def _natural(lm: FrozenLM, n: int, T: int, corpus: Path | None) -> list[Passage]:
    return passages_of(lm, n, T, corpus=corpus)


def _random(lm: FrozenLM, n: int, T: int, corpus: Path | None) -> list[Passage]:
    return random_tokens(lm, n, T)


CASES = {
    "pocket-natural": Case(load_lm, _natural, 128, 12, 2500),
    "pocket-words": Case(load_lm, lambda lm, n, T, _: random_words(lm, n, T), 96, 12, 1000),
    "pythia-160m": Case(lambda: random_model("pythia-160m"), _random, 96, 4, 600),
    "tiny-gpt2": Case(lambda: random_model("tiny-gpt2"), _random, 48, 16, 12_000),
    "tiny-qwen3": Case(lambda: random_model("tiny-qwen3"), _random, 48, 16, 12_000),
}
# The budgets are what passages of daily use cost, and end before a model's vectors are full: then
# every good recipe comes to the same end (docs/log.md has the curves beyond; --budget goes there).
QUICK = {"pocket-natural": (4, 800), "pocket-words": (4, 500)}  # passages, budget
SHOWN = ("tiny-gpt2", "tiny-qwen3")  # 0.5 logits are half of their logits' spread: no fair ratio
QUICK_PUBLISHED = ("low-dim 256 lr 0.1",)  # the best of them for few tokens (docs/log.md)


def growing(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int], staged: bool
) -> list[list[int]]:
    """Horizon of each passage at each cost, from the best vectors that it had by then.

    `staged`: the recipe grows by stages of one token, each of which ends with a forward pass that
    finds all of it right and is followed by no backward pass: half of what a step costs.
    """
    engine = Engine(lm, replace(recipe, budget=costs[-1]), batch_size=len(passages))
    for passage in passages:
        engine.push(passage)
    engine.fill(len(passages))
    order = [job.passage.document for job in engine.jobs]
    before = lm.inputs_before(engine.K, engine.start_rule)
    vectors: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    ended = [0.0] * len(passages)  # forward passes at the ends of stages, in tokens spent
    while True:
        last = engine.batch.vectors, engine.batch.schedule.best
        engine.step()
        batch = engine.batch
        spent, stopped = batch.spent.tolist(), batch.stopped.tolist()
        stages = zip(last[1].clamp_min(0).tolist(), batch.schedule.best.tolist(), strict=True)
        for row, (old, new) in enumerate(stages):
            if staged:
                ended[row] += sum(stage + before for stage in range(old + 1, new + 1)) / 2
            paid = spent[row] + ended[row]
            for at, cost in enumerate(costs):
                # The step that goes past a cost was not paid for at that cost.
                if (order[row], at) not in vectors and (paid > cost or stopped[row]):
                    now = (batch.vectors, batch.schedule.best)
                    best, reach = last if paid > cost else now
                    vectors[order[row], at] = best[row].clone(), int(reach[row])
        if all(stopped):
            break
        engine.fill(len(passages))
    keys = sorted(vectors)
    stack = torch.stack([vectors[key][0] for key in keys])
    # No vectors hold more than they reached by the margins.
    asked = [
        Passage(passages[key[0]].ids[: max(1, vectors[key][1])], passages[key[0]].document)
        for key in keys
    ]
    decoded = decode_ids(lm, stack, [len(p) for p in asked], start=engine.start_rule)
    margins = positions(lm, stack, asked, engine.start_rule).margin
    horizons: list[list[int]] = [[0] * len(costs) for _ in passages]
    for (document, at), ids, passage, margin in zip(keys, decoded, asked, margins, strict=True):
        error = first_error(ids, passage.ids)
        right = len(passage) if error is None else error
        enough = (margin >= engine.recipe.margin - ROUNDING) & (margin > 0)
        sure = int(enough[: len(passage)].int().cumprod(0).sum())
        horizons[document][at] = max(0, min(right, sure, vectors[document, at][1]))
    return horizons


@dataclass
class Search:
    """Where the search for a passage's longest length stands, in predicted tokens."""

    completed: int = 0
    failed: int | None = None

    def next_length(self, most: int) -> int | None:
        """Double until a length fails, then bisect; None when nothing is left to try."""
        if self.failed is None:
            length = max(2, 2 * self.completed)
            return None if self.completed == most else min(length, most)
        middle = (self.completed + self.failed) // 2
        return middle if middle > self.completed else None


def fixed(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int]
) -> list[list[int]]:
    """The same for a recipe of fixed lengths: doubling, then bisection, all of it paid for."""
    engine = Engine(lm, replace(recipe, budget=costs[-1]), batch_size=len(passages))
    searches = [Search() for _ in passages]
    history: list[list[tuple[int, int]]] = [[] for _ in passages]

    def go_on(document: int, spent: int) -> None:
        passage, given = passages[document], engine.given
        length = searches[document].next_length(len(passage) - given)
        if length is not None and spent < costs[-1]:
            cut = Passage(passage.ids[: length + given], document)
            engine.waiting.push(Job(cut, engine.recipe.margin, spent=spent))

    def note(outcome: Outcome) -> None:
        document, length = outcome.passage.document, len(outcome.passage) - engine.given
        if outcome.exact:
            searches[document].completed = length
            history[document].append((outcome.spent, length))
        else:
            searches[document].failed = length
        go_on(document, outcome.spent)

    for document in range(len(passages)):
        go_on(document, 0)
    for outcome in engine.run():
        note(outcome)
    return [
        [max([length for spent, length in row if spent <= cost], default=0) for cost in costs]
        for row in history
    ]


def rows_of(
    case: str, label: str, recipe: Recipe, costs: list[int], horizons: list[list[int]], T: int
) -> list[dict[str, Any]]:
    """One row per cost: what the passages had reached by then."""
    return [
        {
            "case": case,
            "recipe": label,
            "margin": recipe.margin,
            "spent": cost,
            **summary([row[at] for row in horizons]),
            "at_end": sum(row[at] >= T - 1 for row in horizons),
        }
        for at, cost in enumerate(costs)
    ]


def compare(last: dict[str, dict[str, list[int]]]) -> dict[str, float]:
    """The RESULT line from each case's horizons at the full budget."""
    result: dict[str, float] = {}
    apart = 1.0
    for case, horizons in last.items():
        if case in SHOWN and len(last) > 1:
            continue
        ours = horizons["default"]
        published = {k: v for k, v in horizons.items() if k not in ("default", "paper")}
        best = max(published.values(), key=sum)
        for name, theirs in (("ratio", horizons["paper"]), ("ratio_published", best)):
            ratio, low, high = ratio_of_means(ours, theirs)
            if ratio < result.get(name, float("inf")):
                result |= {name: ratio, f"{name}_low": low, f"{name}_high": high}
            apart = min(apart, float(summary(ours)["low"] > summary(theirs)["high"]))
    return result | {"apart": apart}


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A panel per case: mean horizon and its interval against tokens spent."""
    for axis, case in zip(axes, dict.fromkeys(row["case"] for row in rows), strict=True):
        here = [row for row in rows if row["case"] == case]
        for label in dict.fromkeys(row["recipe"] for row in here):
            line = [row for row in here if row["recipe"] == label]
            spent = [row["spent"] for row in line]
            style = {"default": "-", "paper": "--"}.get(label, ":")
            axis.plot(spent, [row["mean"] for row in line], style, label=label)
            axis.fill_between(
                spent, [row["low"] for row in line], [row["high"] for row in line], alpha=0.15
            )
        axis.set_title(f"{case} (n {here[0]['n']})", fontsize=9)
        axis.set_xlabel("forward-backward tokens spent per passage")
        axis.set_ylabel("mean exact horizon, tokens")
        axis.set_ylim(bottom=0)
    axes[-1].legend(fontsize=6)


def main() -> None:
    """Run the recipes side by side in each case."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; --quick: two")
    parser.add_argument("--corpus", type=Path, help="parquet of texts for the natural case")
    parser.add_argument("--passages", type=int, help="passages per case")
    parser.add_argument("--margin", type=float, default=0.5, help="the default's least, in logits")
    parser.add_argument(
        "--same-margin", action="store_true", help="the default's margin for the published, too"
    )
    parser.add_argument("--budget", type=int, help="tokens spent per passage")
    parser.add_argument(
        "--published", nargs="+", choices=PUBLISHED, help="default: all; --quick: one"
    )
    options = parser.parse_args()
    labels = options.published or (QUICK_PUBLISHED if options.quick else tuple(PUBLISHED))
    rows: list[dict[str, Any]] = []
    last: dict[str, dict[str, list[int]]] = {}
    for name in options.cases or (QUICK if options.quick else CASES):
        case = CASES[name]
        n, budget = QUICK.get(name, (3, 600)) if options.quick else (case.passages, case.budget)
        n, budget = options.passages or n, options.budget or budget
        lm = load_lm(options.model) if name.startswith("pocket") else case.load()
        texts = case.text(lm, n, case.tokens, options.corpus)
        passages = [Passage(passage.ids, i) for i, passage in enumerate(texts)]
        costs = [round(budget * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
        # Everybody may spend the whole budget: the default's own limits are for daily use.
        # In the model's own dtype, like the published: a margin is one on the way, too.
        default = Recipe(steps=10**6, patience=10**6, compute="model")
        default = default.in_logits(lm.logit_spread)
        recipes = {"default": replace(default, margin=max(options.margin, default.margin))}
        least = recipes["default"].margin if options.same_margin else 0.0
        for label in labels:
            recipe = PUBLISHED[label]
            recipes[label] = replace(recipe, margin=max(recipe.margin, least))
        recipes["paper"] = Recipe.of("paper")
        last[name] = {}
        for label, recipe in recipes.items():
            if label == "paper":
                horizons = fixed(lm, recipe, passages, costs)
            else:
                horizons = growing(lm, recipe, passages, costs, staged=label in PUBLISHED)
            rows += rows_of(name, label, recipe, costs, horizons, case.tokens)
            last[name][label] = [row[-1] for row in horizons]
            print(f"{name}, {label}: {rows[-1]['mean']:.1f} tokens", file=sys.stderr, flush=True)
    save_figure(options.out / "horizon", lambda axes: draw(axes, rows), len(last))
    full = {row["case"]: row["spent"] for row in rows}  # costs rise, so the last one stays
    ends = [row for row in rows if row["spent"] == full[row["case"]]]
    report("horizon", rows, options, shown=ends, **compare(last))


if __name__ == "__main__":
    main()
