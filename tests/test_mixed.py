"""Mixed precision, ties of the arg-max, and the standard deviation of an embedding matrix."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from conftest import QUICK, build, passages, tiny
from memvec import metrics
from memvec.cramming.engine import Engine
from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.lab.slow import bits_and_margins
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.model.mixed import put_under_autocast
from memvec.model.precision import for_steps
from memvec.model.spread import ROWS_AT_ONCE, embedding_std
from memvec.passages.passage import Passage


def mixed(family: str) -> FrozenLM:
    model = build(family)
    put_under_autocast(model)
    return FrozenLM(model)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "mamba"])
def test_mixed_precision_is_torchs_autocast_over_float32_weights(family):
    """Logits of ids, and of vectors in front of ids, equal those of autocast bit for bit."""
    lm, plain = mixed(family), build(family)
    assert (lm.dtype, lm.rounding) == (torch.float32, torch.bfloat16)
    assert lm.description()["dtype"] == "bfloat16-autocast"
    assert all(p.dtype == torch.float32 for p in lm.model.parameters())
    ids = torch.tensor([[3, 7, 11, 2, 5]])
    vectors = lm.embed(torch.tensor([[4, 9]]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = plain(input_ids=ids, use_cache=False).logits.float()
        inputs = torch.cat([vectors, lm.embed(ids[:, :-1])], dim=1)
        states = plain.base_model(inputs_embeds=inputs, use_cache=False)[0]
        after = plain.get_output_embeddings()(states[:, 1:]).float()  # of as many rows as in memvec
    assert torch.equal(lm.own_logits(ids), own)
    assert torch.equal(lm.logits(vectors, ids), after)
    with torch.no_grad():
        assert not torch.equal(own, plain(input_ids=ids, use_cache=False).logits)


def test_vectors_are_crammed_and_decoded_under_autocast():
    lm, asked = mixed("llama"), passages(4, 5, seed=3)
    assert for_steps(lm, "bfloat16") is lm  # its weights are not rounded as well
    for outcome in Engine(lm, QUICK, vectors=2, batch_size=2).run(asked):
        assert outcome.exact
        assert outcome.vectors.dtype == torch.float32
        (decoded,) = decode_ids(lm, outcome.vectors[None], [len(outcome.passage)], cached=False)
        assert decoded == list(outcome.passage.ids)


def test_a_dtype_of_mixed_precision_is_loaded_by_name(folder: Path):
    lm = load_lm(str(folder), dtype="bfloat16-autocast")
    assert lm.autocast == torch.bfloat16
    assert load_lm(str(folder)).autocast is None
    again = load_lm(str(folder), dtype=lm.description()["dtype"])
    assert again.description() == lm.description()


def test_a_tie_counts_as_the_arg_max_takes_it():
    """The first of equal logits is right, and any other is not, wherever hits are counted."""
    logits = torch.tensor([[2.0, 5.0, 1.0, 5.0], [2.0, 5.0, 1.0, 5.0], [7.0, 5.0, 1.0, 5.0]])
    ids = torch.tensor([1, 3, 0])
    right = logits.argmax(-1) == ids
    assert right.tolist() == [True, False, True]
    margin = metrics.margins(logits[None], ids[None])[0]
    assert (margin > 0).tolist() == right.tolist()
    assert margin.tolist() == pytest.approx([0, 0, 2])
    assert (bits_and_margins(logits.double().numpy(), ids.tolist())[1] > 0).tolist() == [
        *right.tolist()
    ]
    for reference in (False, True):
        recipe = Recipe.of("paper")
        states = logits[None].clone()
        found = score(
            lambda s: s, states, ids[None], recipe, V=logits.shape[-1], reference=reference
        )
        assert (found.margin[0] > 0).tolist() == right.tolist()


@pytest.mark.slow
def test_a_tie_that_the_arg_max_wins_ends_the_paper_preset():
    """Two tokens have the same row of the head; the arg-max takes the first, 4."""
    model = deepcopy(tiny().model)
    with torch.no_grad():
        model.lm_head.weight[9] = model.lm_head.weight[4]
    lm = FrozenLM(model)
    recipe = Recipe.of("paper", start_rule="vectors", lr=0.1, steps=150)
    first, second = (Passage((7, token)) for token in (4, 9))
    ended = {o.passage.ids: o for o in Engine(lm, recipe, vectors=2).run([first, second])}
    assert ended[first.ids].status == "done"
    assert ended[first.ids].metrics.accuracy == 1.0
    assert ended[first.ids].exact
    assert ended[second.ids].status == "budget"
    assert ended[second.ids].metrics.accuracy == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_standard_deviation_of_an_embedding_is_of_all_its_rows(dtype):
    """The rows are read in chunks, and those of later chunks differ from the first."""
    rows = torch.randn(2 * ROWS_AT_ONCE + 300, 3, generator=torch.Generator().manual_seed(0))
    rows[ROWS_AT_ONCE:] *= 4
    weight = rows.to(dtype)
    assert embedding_std(weight) == pytest.approx(float(weight.double().std()), rel=1e-5)
    assert embedding_std(weight) > 2 * float(weight[:ROWS_AT_ONCE].float().std())
