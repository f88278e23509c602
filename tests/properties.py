"""Properties that recipes of several files have to show, each written once."""

from __future__ import annotations

from dataclasses import replace

import torch

from conftest import passages, tiny
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.model.lm import FrozenLM


def exact_as_measured(lm: FrozenLM, recipe: Recipe) -> None:
    """What is called exact is decoded from the vectors that were returned."""
    asked = passages(3, 2, 4, seed=6)
    outcomes = {o.passage.ids: o for o in Engine(lm, recipe, vectors=2, batch_size=3).run(asked)}
    assert sum(o.exact for o in outcomes.values()) >= 2
    for ids, outcome in outcomes.items():
        if outcome.exact:
            rows = outcome.vectors[None].float()
            assert tuple(decode_ids(lm, rows, [len(ids)])[0]) == ids


def alone_as_beside_others(recipe: Recipe) -> None:
    """Bit by bit, where products keep their shape."""
    lm, asked = tiny(), passages(4, 4, 4, seed=5)
    few = replace(recipe, steps=12, margin=1e3)
    options = {"vectors": 2, "batch_size": 3, "fixed_shapes": True}
    together = {o.passage.ids: o for o in Engine(lm, few, **options).run(asked)}
    for passage in asked:
        (alone,) = Engine(lm, few, **options).run([passage])
        assert torch.equal(alone.vectors, together[passage.ids].vectors)
