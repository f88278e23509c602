"""The exact horizon of each passage at each of several costs, for recipes of two kinds.

The cost of a passage is the number of tokens in its forward and backward passes: at each step the
positions that count in the loss plus the inputs in front of them, and the tokens of an encoder's
pass. `growing` measures recipes whose horizon grows step by step. `fixed` measures the paper's
recipe, which crams passages of a fixed length: it searches the longest length that becomes exact,
and all attempts of the search count in the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memvec.arms.geometric import GeometricState
from memvec.cramming.batch import Job
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome, position_scores
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import ScheduleState
from memvec.cramming.starts import start_of
from memvec.decoding import decode_ids, first_error
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage

ROUNDING = 1e-3  # logits: how much a margin may differ when the batch shape is another one


def growing(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int], staged: bool
) -> list[list[int]]:
    """Horizon (tokens) of each passage at each cost, from its best vectors at that cost.

    `staged`: the recipe counts the tokens of a stage until all of them are right, and then begins
    the next stage, with one more token or up to the next target length. The forward pass in which
    all tokens of a stage are right has no backward pass after it, so it costs half a step.
    """
    engine = Engine(lm, replace(recipe, budget=costs[-1]), batch_size=len(passages), poll=1)
    for passage in passages:
        engine.push(passage)
    engine.fill(len(passages))
    order = [job.passage.document for job in engine.jobs]
    before = lm.inputs_before(engine.K, engine.start_rule)
    vectors: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    # Tokens that are spent outside of the steps: in an encoder's pass, and in forward passes that
    # end stages.
    spent_outside = [
        float(_encoder_pass(lm, recipe, passages[number], engine.K)) for number in order
    ]
    while True:
        before_step = engine.batch.vectors, engine.batch.schedule.best
        targets = _targets(engine.batch.schedule)
        engine.step()
        batch = engine.batch
        spent, stopped = batch.spent.tolist(), batch.stopped.tolist()
        right_before_after = zip(
            before_step[1].clamp_min(0).tolist(), batch.schedule.best.tolist(), strict=True
        )
        for row, (old, new) in enumerate(right_before_after):
            if staged:
                done = _stages_done(old, new, None if targets is None else targets[row])
                spent_outside[row] += sum(stage + before for stage in done) / 2
            # One forward pass over the text without vectors, for each token that is reached.
            if recipe.term == "alignment":
                spent_outside[row] += (new - old) / 2
            total_spent = spent[row] + spent_outside[row]
            for cost_index, cost in enumerate(costs):
                # The step that goes past a cost does not count at that cost.
                if (order[row], cost_index) not in vectors and (total_spent > cost or stopped[row]):
                    after_step = (batch.vectors, batch.schedule.best)
                    best, best_right = before_step if total_spent > cost else after_step
                    vectors[order[row], cost_index] = best[row].clone(), int(best_right[row])
        if all(stopped):
            break
        engine.fill(len(passages))
    keys = sorted(vectors)
    stack = torch.stack([vectors[key][0] for key in keys])
    # Only the leading tokens that met the margin in the steps are decoded.
    leading = [
        Passage(passages[key[0]].ids[: max(1, vectors[key][1])], passages[key[0]].document)
        for key in keys
    ]
    decoded = decode_ids(lm, stack, [len(p) for p in leading], start_rule=engine.start_rule)
    margins = position_scores(lm, stack, leading, engine.start_rule).margin
    horizons: list[list[int]] = [[0] * len(costs) for _ in passages]
    for (document, cost_index), ids, passage, margin in zip(
        keys, decoded, leading, margins, strict=True
    ):
        error = first_error(ids, passage.ids)
        decoded_right = len(passage) if error is None else error
        meets_margin = (margin >= engine.recipe.margin - ROUNDING) & (margin > 0)
        right_with_margin = int(meets_margin[: len(passage)].int().cumprod(0).sum())
        horizons[document][cost_index] = max(
            0, min(decoded_right, right_with_margin, vectors[document, cost_index][1])
        )
    return horizons


def _encoder_pass(lm: FrozenLM, recipe: Recipe, passage: Passage, K: int) -> int:
    """Inputs of the encoder's pass over a passage, counted as a forward and a backward pass.

    0 if the recipe does not start from the encoder's vectors.
    """
    if lm.encoder is None or start_of(lm, recipe) != "encoder":
        return 0
    tokens = K * lm.encoder.tokens if lm.encoder.tokens else len(passage)
    return min(tokens, len(passage)) + K


def _targets(schedule: ScheduleState) -> list[int] | None:
    """The length at which each passage's present stage ends; None if a stage is one token."""
    return schedule.target.tolist() if isinstance(schedule, GeometricState) else None


def _stages_done(old: int, new: int, target: int | None) -> list[int]:
    """The length of each stage that ended when the number of right tokens rose from old to new.

    `target` is the length at which the present stage ends; None if a stage is one token.
    """
    if target is None:
        return list(range(old + 1, new + 1))
    return [target] if old < target <= new else []


@dataclass
class Search:
    """State of the search for the longest length of a passage that becomes exact.

    Lengths are numbers of predicted tokens.
    """

    completed: int = 0  # the longest length that became exact
    failed: int | None = None  # the shortest length that did not

    def next_length(self, max_length: int) -> int | None:
        """The next length to try: doubled until one fails, then bisected. None at the end."""
        if self.failed is None:
            length = max(2, 2 * self.completed)
            return None if self.completed == max_length else min(length, max_length)
        middle = (self.completed + self.failed) // 2
        return middle if middle > self.completed else None


def fixed(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int]
) -> list[list[int]]:
    """Horizon (tokens) of each passage at each cost for a recipe that crams fixed lengths.

    The length is doubled until one fails, then bisected. All attempts count in the cost.
    """
    engine = Engine(lm, replace(recipe, budget=costs[-1]), batch_size=len(passages))
    searches = [Search() for _ in passages]
    exact_lengths: list[list[tuple[int, int]]] = [[] for _ in passages]

    def push_next_length(document: int, spent: int) -> None:
        passage, given = passages[document], engine.given
        length = searches[document].next_length(len(passage) - given)
        if length is not None and spent < costs[-1]:
            leading = Passage(passage.ids[: length + given], document)
            engine.waiting.push(Job(leading, engine.recipe.margin, spent=spent))

    def record(outcome: Outcome) -> None:
        document, length = outcome.passage.document, len(outcome.passage) - engine.given
        if outcome.exact:
            searches[document].completed = length
            exact_lengths[document].append((outcome.spent, length))
        else:
            searches[document].failed = length
        push_next_length(document, outcome.spent)

    for document in range(len(passages)):
        push_next_length(document, 0)
    for outcome in engine.run():
        record(outcome)
    return [
        [max([length for spent, length in row if spent <= cost], default=0) for cost in costs]
        for row in exact_lengths
    ]
