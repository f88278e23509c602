"""Checks of properties of recipes, used by tests in several files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from conftest import passages, tiny
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage


def exact_as_measured(lm: FrozenLM, recipe: Recipe) -> None:
    """The vectors of an outcome that is called exact decode to its passage."""
    asked = passages(3, 2, 4, seed=6)
    outcomes = {o.passage.ids: o for o in Engine(lm, recipe, vectors=2, batch_size=3).run(asked)}
    assert sum(o.exact for o in outcomes.values()) >= 2
    for ids, outcome in outcomes.items():
        if outcome.exact:
            rows = outcome.vectors[None].float()
            assert tuple(decode_ids(lm, rows, [len(ids)])[0]) == ids


def paths(engine: Engine, asked: Iterable[Passage]) -> dict[Passage, Tensor]:
    """Run the engine: the parameters of each passage after each of its steps, (steps, ...).

    The vectors of an outcome are those of its best step. If no margin is met, that is the first
    step, so such an outcome does not show what the steps did.
    """
    found: dict[Passage, list[Tensor]] = {}
    step = engine.step

    def recorded() -> None:
        step()
        for job, row in zip(engine.jobs, engine.batch.parameters.detach().clone(), strict=True):
            found.setdefault(job.passage, []).append(row)

    engine.step = recorded
    assert {o.passage for o in engine.run(asked)} == found.keys()
    return {passage: torch.stack(rows) for passage, rows in found.items()}


def moves(path: Tensor) -> bool:
    """True if a path has several steps and each of them changed the parameters."""
    return len(path) > 2 and bool(path[:-1].diff(dim=0).flatten(1).any(1).all())


def alone_as_beside_others(recipe: Recipe) -> None:
    """The parameters of a passage are equal bit by bit after each step, alone and beside others.

    Products keep their shape and the passage its slot, because a product may round the last rows of
    a batch in another way than the first.
    """
    lm, asked = tiny(), passages(4, 4, 4, seed=5)
    few = replace(recipe, steps=12, margin=1e3)
    options = {"vectors": 2, "batch_size": 3, "fixed_shapes": True}
    for i, passage in enumerate(asked):
        alone = paths(Engine(lm, few, **options), [passage])[passage]
        together = paths(Engine(lm, few, **options), [*asked[i:], *asked[:i]])[passage]
        assert moves(alone)
        assert torch.equal(alone, together)
