"""The exact horizon of each passage at each of several costs, for recipes of both kinds.

The cost of a passage is the number of tokens in its forward and backward passes: the positions that
counted at each step, plus the vectors, and the pass of an encoder. `growing` is for recipes whose
horizon grows step by step. `fixed` is for the paper's recipe, which crams passages of fixed length:
it searches the longest length, and the search is part of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memvec.arms.geometric import GeometricState
from memvec.cramming.certify import Outcome, positions
from memvec.cramming.engine import Engine, Job
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import ScheduleState
from memvec.cramming.starts import start_of
from memvec.decoding import decode_ids, first_error
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage

ROUNDING = 1e-3  # logits: the same sums in another batch shape


def growing(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int], staged: bool
) -> list[list[int]]:
    """Horizon (tokens) of each passage at each cost, from its best vectors at that cost.

    `staged`: the recipe grows by stages of one token, or up to a target. Each stage ends with a
    forward pass in which all its tokens are right. No backward pass follows, so it costs half a
    step.
    """
    engine = Engine(lm, replace(recipe, budget=costs[-1]), batch_size=len(passages), poll=1)
    for passage in passages:
        engine.push(passage)
    engine.fill(len(passages))
    order = [job.passage.document for job in engine.jobs]
    before = lm.inputs_before(engine.K, engine.start_rule)
    vectors: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    # Tokens spent besides the steps: in an encoder's pass, and in forward passes that end stages.
    besides = [float(_encoder_pass(lm, recipe, passages[number], engine.K)) for number in order]
    while True:
        before_step = engine.batch.vectors, engine.batch.schedule.best
        targets = _targets(engine.batch.schedule)
        engine.step()
        batch = engine.batch
        spent, stopped = batch.spent.tolist(), batch.stopped.tolist()
        stages = zip(
            before_step[1].clamp_min(0).tolist(), batch.schedule.best.tolist(), strict=True
        )
        for row, (old, new) in enumerate(stages):
            if staged:
                done = _stages_done(old, new, None if targets is None else targets[row])
                besides[row] += sum(stage + before for stage in done) / 2
            if recipe.term == "alignment":  # a forward pass over the plain text, once for a token
                besides[row] += (new - old) / 2
            paid = spent[row] + besides[row]
            for at, cost in enumerate(costs):
                # The step that goes past a cost was not paid for at that cost.
                if (order[row], at) not in vectors and (paid > cost or stopped[row]):
                    now = (batch.vectors, batch.schedule.best)
                    best, reach = before_step if paid > cost else now
                    vectors[order[row], at] = best[row].clone(), int(reach[row])
        if all(stopped):
            break
        engine.fill(len(passages))
    keys = sorted(vectors)
    stack = torch.stack([vectors[key][0] for key in keys])
    # Only the tokens that reached the margins are decoded.
    leading = [
        Passage(passages[key[0]].ids[: max(1, vectors[key][1])], passages[key[0]].document)
        for key in keys
    ]
    decoded = decode_ids(lm, stack, [len(p) for p in leading], start=engine.start_rule)
    margins = positions(lm, stack, leading, engine.start_rule).margin
    horizons: list[list[int]] = [[0] * len(costs) for _ in passages]
    for (document, at), ids, passage, margin in zip(keys, decoded, leading, margins, strict=True):
        error = first_error(ids, passage.ids)
        right = len(passage) if error is None else error
        enough = (margin >= engine.recipe.margin - ROUNDING) & (margin > 0)
        sure = int(enough[: len(passage)].int().cumprod(0).sum())
        horizons[document][at] = max(0, min(right, sure, vectors[document, at][1]))
    return horizons


def _encoder_pass(lm: FrozenLM, recipe: Recipe, passage: Passage, K: int) -> int:
    """Inputs of the encoder's pass over a passage, counted as forward and backward; 0 without."""
    if lm.encoder is None or start_of(lm, recipe) != "encoder":
        return 0
    tokens = K * lm.encoder.tokens if lm.encoder.tokens else len(passage)
    return min(tokens, len(passage)) + K


def _targets(schedule: ScheduleState) -> list[int] | None:
    """The end of each passage's stage, in tokens; None if every token is a stage."""
    return schedule.target.tolist() if isinstance(schedule, GeometricState) else None


def _stages_done(old: int, new: int, target: int | None) -> list[int]:
    """Tokens of each stage that a measurement ended, when `old` right tokens became `new`."""
    if target is None:
        return list(range(old + 1, new + 1))
    return [target] if old < target <= new else []


@dataclass
class Search:
    """State of the search for a passage's longest length, in predicted tokens."""

    completed: int = 0
    failed: int | None = None

    def next_length(self, max_length: int) -> int | None:
        """Double until a length fails, then bisect; None when nothing is left to try."""
        if self.failed is None:
            length = max(2, 2 * self.completed)
            return None if self.completed == max_length else min(length, max_length)
        middle = (self.completed + self.failed) // 2
        return middle if middle > self.completed else None


def fixed(
    lm: FrozenLM, recipe: Recipe, passages: list[Passage], costs: list[int]
) -> list[list[int]]:
    """Horizon of each passage at each cost for a recipe of fixed lengths.

    The length is doubled until one fails, then bisected; all attempts count in the cost.
    """
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
