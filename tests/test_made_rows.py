"""Tables, figures and captions of reports, from rows of a study that are written by hand."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from conftest import tiny
from memvec import registry
from memvec.errors import MemvecError
from memvec.lab.protocols.checkpoints import _exponents_table
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.paper import paper_result
from memvec.lab.protocols.recurrent_report import chains_of
from memvec.lab.protocols.scaling import exact_scaling, published_scaling, scaling_sentence
from memvec.lab.report.byte_account import _huffman_bits, bytes_table
from memvec.lab.report.contents import all_plots, all_tables
from memvec.lab.report.cost import cost_table
from memvec.lab.report.data import MAX_NAME, Data, read_data
from memvec.lab.report.figures import draw_all
from memvec.lab.report.lengths import lengths
from memvec.lab.report.models import models_table
from memvec.lab.report.page import reproduce
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.recipes import recipes_table
from memvec.lab.report.seeds import seeds_table
from memvec.lab.report.texts import comparisons
from memvec.lab.report.utilisation import utilisation_figure
from memvec.lab.sentences import evaluate
from memvec.lab.sentences.flops import COSTS
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.cells import Cell, expand
from memvec.lab.study.check import _sampled
from memvec.lab.study.check_pairs import check_pairs
from memvec.lab.study.model_names import distinct_names, model_names
from memvec.lab.study.row import Row, StoreEntry, Text
from memvec.lab.study.spec import ModelKey, parse_spec
from memvec.lab.study.store import Store
from memvec.passages.passage import Passage
from memvec.statistics import mean_interval

HEAD = 'name = "made"\n[[models]]\nname = "pocket"\n[[sources]]\nkind = "random-tokens"\n'
MODEL = {"name": "pocket", "weights": "w", "config": "c", "probe": [0.0], "dtype": "float32"}
MODEL |= {"width": 8, "vocabulary": 64, "revision": None}
ONE = '[[runs]]\nprotocol = "exact"\nlengths = [4]\npassages = 1\n'

RowOf = Callable[[Cell, int], dict[str, Any]]  # (cell, number of the passage) -> fields of its row


def made(store: Store, spec: str, row_of: RowOf) -> Data:
    """The data of a study whose rows have these fields; by default every passage is exact."""
    planned = expand(parse_spec(HEAD + spec, "made"))
    store.plan(planned, set(), {"name": "made"})
    store.set_environment({"gpu": None})
    for cell, count in ((p.cell, p.passages) for p in planned):
        store.describe(cell.key, MODEL)
        for number in range(count):
            row = row_of(cell, number)
            T = row.pop("tokens", cell.length)
            name = f"{number} of {T}"
            passage, before = Passage(tuple(range(2, T + 2))), row.pop("before", ())
            source = SourcedPassage(number, passage, f"text {number}", before)
            store.put_passages(cell.key, [(name, source, Text(b"w " * T, ["w"] * T))])
            right = row.get("horizon", T)
            fields = {"predicted": T, "status": "done", "exact": right == T, "horizon": right}
            fields |= {"accuracy": right / T, "margin": 0.5, "margin_asked": 0.5, "lm_right": 0}
            fields |= {"lm_bits": 5.0 * T, "mem_bits": 0.0, "information_gain": 5.0 * right}
            fields |= {"token_gain": right, "horizon_gain": 5.0 * right, "steps": 9, "spent": 99}
            fields |= {"horizon_token_gain": right, "seconds": 0.1, "start_rule": "vectors"}
            fields |= {"batch_size": 8, "worker": "w", "extra": {}} | row
            whole = Row(cell=cell.key, number=number, passage=name, tokens=T, **fields)
            scores = torch.zeros(4, fields["predicted"])
            store.put(StoreEntry(whole, torch.ones(cell.vectors, 8), scores))
    return read_data(store)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store, closed after the test."""
    with Store(tmp_path, write=True) as opened:
        yield opened


def test_a_full_disk_says_that_the_rows_before_are_kept(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemvecError, match=r"No space left on device; what is in it is kept, and"):
        made(store, ONE, lambda cell, number: {})


@pytest.mark.parametrize("at_8", [(8, 7), (7, 6)])
def test_texts_are_compared_at_the_longest_length_that_fills_both(at_8, store):
    """At length 16 both recipes are equal; at 8, which does not count, one of them is better."""
    run = '[[runs]]\nprotocol = "paper"\nlengths = [8, 16]\npassages = 6\nrecipe = { steps = %d }\n'

    def row_of(cell, number):
        if cell.length == 16:
            return {"horizon": 12 + number % 2}
        return {"horizon": at_8[cell.recipe["steps"] != 100]}

    found = comparisons(made(store, run % 50 + run % 100, row_of))
    assert len(found) == 2
    for comparison in found:
        assert comparison.paired
        assert comparison.n == (6, 6)
        assert (comparison.difference.value, *set(comparison.means)) == (
            0.0,
            12.5 if comparison.measure == "token gain" else 62.5,
        )


@pytest.mark.parametrize("lengths", [[8], [8, 16], [4, 8, 16]])
def test_a_passage_of_several_lengths_counts_once_in_the_figure_of_horizons(lengths, store):
    spec = f'[[runs]]\nprotocol = "exact"\nlengths = {lengths}\npassages = 5\n'
    data = made(store, spec, lambda cell, number: {})
    (plot,) = protocol_of("exact").figures(data, compare=False)
    (series,) = plot.panels[0].series
    assert series.x == [0.0, max(lengths)]
    assert series.y == [1.0, 1.0]
    assert "; n 5 for each line." in plot.caption


def test_a_line_of_horizons_that_no_passage_ends_reaches_zero(store):
    """A line that ends above 0 says that longer passages might have been exact: here none is."""
    spec = ONE.replace("passages = 1", "passages = 4")
    data = made(store, spec, lambda cell, number: {"horizon": number // 2})
    (plot,) = protocol_of("exact").figures(data, compare=False)
    (series,) = plot.panels[0].series
    assert list(zip(series.x, series.y, strict=True)) == [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0)]


def test_captions_have_the_number_of_passages_and_shares_stay_between_0_and_1(store):
    """One of the two lengths has two passages, the other three, half of them without any hit."""
    run = '[[runs]]\nprotocol = "paper"\nlengths = [{}]\npassages = {}\n'
    spec = run.format(8, 2) + run.format(16, 3)
    data = made(store, spec, lambda cell, number: {"horizon": number % 2 * cell.length})
    plots = {plot.key: plot for plot in all_plots(data, compare=False)}
    for key, what in (("accuracy", "length"), ("boxes", "box"), ("per-token", "length")):
        assert f"; n 2 to 3 for each {what}." in plots[key].caption
    assert "; n 3 for each line." in plots["positions"].caption
    (panel,) = plots["accuracy"].panels
    for series in panel.series:
        edges = [*(series.low or []), *(series.high or [])]
        assert all(0.0 <= edge <= 1.0 for edge in edges)
    assert panel.series[0].low == [0.0, 0.0]


@pytest.mark.parametrize("extra", [0, 3])
def test_two_recipes_are_compared_on_the_passages_that_both_have(extra, store):
    """The second recipe adds one token to every passage, so the paired interval has no width."""
    run = '[[runs]]\nprotocol = "exact"\nlengths = [16]\npassages = %d\nrecipe = { steps = %d }\n'

    def row_of(cell, number):
        return {"horizon": 2 * number + (cell.recipe["steps"] == 100)}

    data = made(store, run % (6, 50) + run % (6 + extra, 100), row_of)
    table = recipes_table(data)
    lines = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [line["measure"] for line in lines] == ["exact tokens", "bits"]
    for line, unit in zip(lines, (1, 5), strict=True):
        assert line["recipes"] == "steps 50 − steps 100"
        assert (line["n"], line["first"], line["second"]) == (6, 5 * unit, 6 * unit)
        assert (line["difference"], line["low"], line["high"]) == (-unit, -unit, -unit)
    one = made_alone(store.folder / "one", run % (6, 50), row_of)
    assert not recipes_table(one).rows


def made_alone(folder: Path, spec: str, row_of: RowOf) -> Data:
    with Store(folder, write=True) as other:
        return made(other, spec, row_of)


def test_the_segments_of_one_document_count_as_one_value(store):
    spec = '[[runs]]\nprotocol = "recurrent"\nlengths = [16]\npassages = 4\n'
    spec += 'options = { encoder = "e.safetensors" }\n'

    def row_of(cell, number):
        whole = [4] * 4 if number % 2 else [0] * 4
        return {"extra": {"segment": 4, "back": whole, "right": whole, "alone": whole}}

    data = made(store, spec, row_of)
    (chain,) = chains_of(data.of("recurrent"))
    assert (chain.alone.mean, chain.alone.n) == (2.0, 4)
    assert chain.alone.low == chain.carried.low / 4


@pytest.mark.parametrize("given", [0, 1])
def test_arithmetic_coding_counts_a_given_first_token(given, store):
    spec = '[[runs]]\nprotocol = "paper"\nlengths = [8]\npassages = 3\n'
    data = made(store, spec, lambda cell, number: {"predicted": 8 - given, "lm_bits": 40.0})
    table = bytes_table(data, compare=False)
    bits = 3 * (40.0 + given * math.log2(64))
    at = table.columns.index("arithmetic")
    size = table.rows[0][table.columns.index("text bytes")]
    assert table.rows[0][at] == pytest.approx(size / (bits / 8))


def test_huffmans_code_has_one_bit_for_the_most_frequent_byte(store):
    """Three texts have 24 bytes of 1 bit, 24 of 2 bits, and two line ends of 2 bits."""
    spec = '[[runs]]\nprotocol = "paper"\nlengths = [8]\npassages = 3\n'
    table = bytes_table(made(store, spec, lambda cell, number: {}), compare=False)
    (line,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert line["text bytes"] == 3 * len("w " * 8)
    assert line["huffman"] == pytest.approx(3 * 16 / ((24 * 1 + 24 * 2 + 2 * 2) / 8))
    assert [_huffman_bits(text) for text in (b"", b"aaaa", b"aaaabbc")] == [1, 4, 10]


@pytest.mark.parametrize("cut", [0, 1])
def test_a_passage_counts_as_cut_if_one_of_its_restarts_was(cut, store):
    spec = spec_of("paper", [8], 3, "seeds = [0, 1]")

    def row_of(cell, number):
        status = "budget" if cell.seed == cut else "done"
        exact = cell.seed != cut
        return {"steps": 5 + 2 * cell.seed, "status": status, "exact": exact, "horizon": 6 + exact}

    rows = made(store, spec, row_of).of("paper")
    assert rows["number"].tolist() == [0, 1, 2]
    assert rows["steps"].tolist() == [7] * 3
    assert rows["status"].tolist() == ["budget"] * 3
    assert rows["exact"].tolist() == [0.5] * 3
    assert rows["horizon"].tolist() == [6.5] * 3


def test_a_report_names_only_the_models_and_machines_of_its_rows(store):
    spec = '[[models]]\nname = "other"\n' + ONE + "models = ['pocket', 'other']\n"
    data = made(store, spec, lambda cell, number: {})
    assert [*data.models] == ["pocket", "other"]
    assert data.environments == [{"gpu": None}]
    store.set_environment({"gpu": "H200"})  # of no row
    store.db.execute("UPDATE cells SET planned = 0 WHERE model = 'pocket'")
    data = read_data(store)
    assert [*data.models] == ["other"]
    assert data.environments == [{"gpu": None}]
    assert (len(data.rows), data.planned) == (1, 1)


def test_seeds_are_compared_at_the_lengths_that_all_of_them_have(store):
    spec = spec_of("paper", [8], 3, "seeds = [0, 1]") + spec_of("paper", [16], 3, "seeds = [0]")
    (row,) = seeds_table(made(store, spec, lambda cell, number: {})).rows
    assert row[3:5] == [2, "8, 8"]
    store.db.execute("UPDATE cells SET planned = 0 WHERE length = 8 AND seed = 1")
    assert not seeds_table(read_data(store)).rows


def test_the_figure_of_utilisation_is_of_the_fewest_vectors(store):
    """A token is one of 64, and so has 6 bits; a vector has 8 numbers of 16 bits.

    If a token needs 5 bits, the share of bits is smaller than that of tokens; at 7 bits it is not.
    """
    more = "vectors = [2, 1, 4]\nsources = ['random-tokens', 'b', 'c']\n"
    sources = "".join(
        f'[[sources]]\nname = "{name}"\nkind = "random-tokens"\nseed = {seed}\n'
        for seed, name in enumerate("bc", 1)
    )

    def row_of(cell, number):
        bits = 7.0 if cell.source == "c" else 5.0
        right = 2 * cell.vectors
        return {"horizon": right, "horizon_gain": bits * right, "information_gain": bits * right}

    plot = utilisation_figure(
        made(store, sources + spec_of("exact", [16], 3, more), row_of), compare=False
    )
    reached, shares = plot.panels
    of_sources = reached.series[:3]
    assert [series.x for series in of_sources] == [[pytest.approx(8 * 16 / 6)]] * 3
    assert [series.y for series in of_sources] == [[2.0]] * 3
    found = {series.name: series.y for series in shares.series}
    expected = {"tokens": 100 * 2 / (8 * 16 / 6), "bits": 100 * 10 / (8 * 16)}
    assert found["b, tokens"] == [pytest.approx(expected["tokens"])]
    assert found["b, bits"] == [pytest.approx(expected["bits"])]
    assert found["c, bits"] == [pytest.approx(100 * 14 / (8 * 16))]
    assert "the share of bits is the smaller one in 2 of 3 cases" in plot.caption


@pytest.mark.parametrize(
    ("sample", "numbers"), [(0, range(9)), (1, [0]), (3, [0, 4, 8]), (9, range(9)), (99, range(9))]
)
def test_checked_rows_are_spread_over_the_study(sample, numbers, store):
    made(store, spec_of("paper", [4], 9), lambda cell, number: {})
    assert _sampled(store, sample)["number"].tolist() == [*numbers]


def test_a_repeated_passage_counts_once_in_the_byte_account(store):
    """A compressor would store its text once as well."""
    spec = '[[runs]]\nprotocol = "paper"\nlengths = [8]\npassages = 3\n'
    made(store, spec, lambda cell, number: {})
    store.db.execute("UPDATE rows SET passage = '0 of 8' WHERE number = 2")
    table = bytes_table(read_data(store), compare=False)
    (line,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (line["passages"], line["text bytes"]) == (2, 2 * len("w " * 8))


def test_a_cost_is_the_sum_over_all_cells_and_passages_of_a_protocol(store):
    spec = spec_of("paper", [4, 8], 3) + spec_of("exact", [4], 2)

    def row_of(cell, number):
        return {"steps": cell.length + number, "spent": 100 * cell.length, "seconds": 0.5}

    table = cost_table(made(store, spec, row_of))
    found = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert found == [
        {"model": "pocket", "protocol": "paper", "cells": 2, "passages": 6}
        | {"steps": 4 + 5 + 6 + 8 + 9 + 10, "tokens": 3 * 400 + 3 * 800, "seconds": 3.0},
        {"model": "pocket", "protocol": "exact", "cells": 1, "passages": 2}
        | {"steps": 4 + 5, "tokens": 2 * 400, "seconds": 1.0},
    ]


@pytest.mark.parametrize("start_rule", ["vectors", "bos"])
def test_with_a_bos_the_longest_length_is_still_that_of_the_grid(start_rule, store):
    spec = '[[runs]]\nprotocol = "paper"\nlengths = [8, 16]\npassages = 3\n'
    given = int(start_rule == "bos")
    data = made(
        store, spec, lambda cell, n: {"tokens": cell.length - given, "start_rule": start_rule}
    )
    line = published_scaling(data.of("paper")).iloc[0]
    assert (line["longest"], line["tried"]) == (16, 16)
    drawn = data.of("paper").assign(tokens=[6, 7, 8, 14, 15, 16 - given])
    assert paper_result(drawn).longest == 16


def test_a_passage_at_several_lengths_is_one_in_the_published_gains_over_k(store):
    def row_of(cell, number):
        return {"horizon": 5 + number, "accuracy": 0.5}

    spec = spec_of("paper", [8, 16, 32], 3, "vectors = [1, 2]")
    data = made(store, spec, row_of)
    one = mean_interval([5, 6, 7])
    for line in published_scaling(data.of("paper")).to_dict("records"):
        assert (line["n"], line["token_gain"]) == (3, 6)
        assert (line["token_gain_low"], line["token_gain_high"]) == pytest.approx(
            (one.low, one.high)
        )


@pytest.mark.parametrize("untrained", [True, False])
@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_stages_before_training_are_named_if_there_are_any(seeds, untrained, store):
    """Runs of one shape and seed differ in something else: they are not a mean of two seeds."""
    stages = [0 if untrained else 10, 20, 40]
    names = [f"{run}-{tokens}" for run in "ab" for tokens in stages]
    spec = "".join(f'[[models]]\nname = "{name}"\n' for name in names)
    spec += spec_of("checkpoints", [4], 2, f"models = {names}")

    def row_of(cell, number):
        run, tokens = cell.model.split("-")
        extra = {"run": run, "family": "f", "seed": seeds["ab".index(run)], "tokens": int(tokens)}
        return {"extra": extra | {"step": 1, "valid": 2.0, "width": 8, "layers": 2}}

    data = made(store, spec, row_of)
    found = lines(data, "checkpoints", "checkpoints")
    apart = seeds == (0, 0)
    shapes = ["f, a, D 8, L 2", "f, b, D 8, L 2"] if apart else ["f, D 8, L 2"]
    assert [line["model"] for line in found] == [shape for shape in shapes for _ in stages]
    assert {line["seeds"] for line in found} == {1 if apart else 2}
    (figure,) = protocol_of("checkpoints").figures(data, compare=False)
    assert figure.caption.count("is the model before training") == untrained
    assert figure.caption.count("per dimension before training") == untrained * len(shapes)
    assert figure.caption.count("per dimension after 10 tokens") == (not untrained) * len(shapes)


def test_the_fits_are_of_models_before_training_only_if_they_read_nothing():
    for first in (0, 10):
        stages = [
            pd.DataFrame([{"family": "f", "width": D, "layers": L, "tokens": t, "bits": D * L + t}])
            for t in (first, 40)
            for D, L in ((8, 1), (8, 2), (16, 1), (16, 2), (32, 4))
        ]
        table = _exponents_table(stages)
        when = [row[table.columns.index("when")] for row in table.rows]
        assert when == (["at the end"] if first else ["before training", "at the end"])


@pytest.mark.parametrize("protocol", ["transfer", "recurrent"])
def test_a_protocol_of_one_start_refuses_several_seeds(protocol):
    options = {"transfer": 'origin = "pocket"', "recurrent": 'encoder = "e.safetensors"'}
    run = f'[[runs]]\nprotocol = "{protocol}"\nlengths = [8]\nseeds = [0, 1]\n'
    with pytest.raises(MemvecError, match="one start: leave one of seeds"):
        parse_spec(HEAD + run + f"options = {{ {options[protocol]} }}\n", "made")


def test_a_sentence_in_the_context_of_several_others_counts_once(store):
    spec = '[[runs]]\nprotocol = "sentences"\nlengths = [8]\npassages = 3\n'
    spec += 'options = { latents = "s.safetensors", context = 2 }\n'
    sentences, flags = [(5, 6), (7, 8, 9), (5,), (9,)], [[0, 1], [1, 1], [0, 0], [1, 1]]

    def row_of(cell, number):
        some = slice(number, number + 2)
        bits = dict.fromkeys(evaluate.WAYS, 9.0)
        extra = {"bits": bits, "continuous": [], "discretised": [], "encoded_exact": 1}
        extra |= {"flops": dict.fromkeys(COSTS, 1.0), "before_exact": flags[some]}
        extra |= {"sizes": [len(ids) for ids in sentences[some]]}
        return {"extra": extra, "before": (3, *itertools.chain(*sentences[some]))}

    *_, exact = protocol_of("sentences").tables(made(store, spec, row_of), compare=False)
    assert [row[3] for row in exact.rows] == [3, 3, 4, 4]
    assert [row[2].split(" %")[0] for row in exact.rows[2:]] == ["50", "75"]


def frontier(store, models, sources=("random-tokens",)):
    """Data of the protocol 'usable' whose KL depends on the passage and the source."""
    spec = "".join(f'[[models]]\nname = "{name}"\n' for name in models)
    spec += '[[sources]]\nname = "other"\nkind = "random-tokens"\nseed = 1\n'
    spec += '[[runs]]\nprotocol = "usable"\nlengths = [8]\npassages = 3\n'
    spec += f"models = {list(models)}\nsources = {list(sources)}\n"

    def row_of(cell, number):
        kl = 1.0 + number / 10 + (cell.source == "other")
        contexts = {name: [kl, kl] for name in ("vectors", "last 1 token")}
        contexts |= {"nothing": [4.0, 4.0], "text": [0.0, 1.0]}
        extra = {"contexts": contexts, "rms": 1.0, "layers": {}, "directions": {}, "words": []}
        return {"extra": extra}

    return made(store, spec, row_of)


def test_models_with_the_same_last_name_have_a_panel_and_an_entry_each(store):
    data = frontier(store, ("a/model", "b/model"))
    (plot,) = protocol_of("usable").figures(data, compare=False)
    assert [panel.title for panel in plot.panels] == ["a/model, K = 1", "b/model, K = 1"]
    assert list(reproduce(data)["models"]) == ["a/model", "b/model"]
    for table in protocol_of("usable").tables(data, compare=False):
        at = table.columns.index("model")
        assert list(dict.fromkeys(row[at] for row in table.rows)) == ["a/model", "b/model"]


def test_a_models_name_is_as_short_as_tells_it_from_the_others():
    alike = distinct_names(["/x/a/m", "/y/a/m", "m", "other/n"])
    assert list(alike.values()) == ["x/a/m", "y/a/m", "m", "n"]
    inside = ["m", "a/m", "x/a/m"]  # the ends of each other
    assert list(distinct_names(inside).values()) == inside
    keys = [
        ModelKey("a/m", None, "auto", None),
        ModelKey("a/m", None, "auto", "8bit"),
        ModelKey("n", None, "auto", None),
        ModelKey("n", None, "bfloat16", "4bit"),
        ModelKey("b/o", "step1", "float16", None),
        ModelKey("b/o", None, "float16", None),
        ModelKey("p", "step1", "float16", None),
    ]
    names = ["m", "m, 8bit", "n, auto", "n, bfloat16, 4bit", "o, step1", "o, main", "p"]
    assert list(model_names(keys).values()) == names


def test_tables_say_which_models_are_quantized(store):
    spec = '[[models]]\nname = "a/model"\nquantize = "8bit"\n' + ONE
    data = made(store, spec, lambda cell, number: {})
    tables = [*protocol_of("exact").tables(data, compare=False), bytes_table(data, compare=False)]
    for table in [*tables, cost_table(data)]:
        at = table.columns.index("model")
        assert [row[at] for row in table.rows] == ["pocket", "model, 8bit"]
    assert list(reproduce(data)["models"]) == ["pocket", "model, 8bit"]


def test_a_table_says_how_each_model_was_loaded(store, monkeypatch):
    """'auto' in a spec is another dtype on another device, even within one study."""
    monkeypatch.setattr(sys.modules[__name__], "HEAD", HEAD.replace('"pocket"', '"/home/me/m"'))
    described = iter([{"dtype": "bfloat16", "device": "cuda", "weights": "a" * 64}, {}])
    before = store.describe

    def describe(cell, description):
        before(cell, {**description, **next(described)})

    monkeypatch.setattr(store, "describe", describe)
    spec = ONE.replace("lengths = [4]", "lengths = [4, 8]")
    table = models_table(made(store, spec, lambda cell, number: {}))
    (row,) = (dict(zip(table.columns, cells, strict=True)) for cells in table.rows)
    assert (row["model"], row["Hub id or folder"], row["dtype"]) == ("m", "m", "bfloat16, float32")
    assert (row["embeddings"], row["D"], row["V"]) == ("aaaaaaaaaaaa, w", 8, 64)
    assert (row["quantized"], row["revision"], row["rows"]) == (None, None, 2)
    assert table.key in {t.key for t in all_tables(read_data(store), compare=False)}


@pytest.mark.parametrize("same_width", [False, True])
def test_a_model_that_is_loaded_in_two_ways_counts_once_in_a_correlation(
    same_width, store, monkeypatch
):
    """A model in two dtypes is no second model, and equal widths have no correlation."""
    names = [f"a/m{i}" for i in range(4)]
    more = "".join(f'[[models]]\nname = "{name}"\n' for name in names)
    twice = "".join(f'[[models]]\nname = "a/m0"\ndtype = "{d}"\n' for d in ("bfloat16", "float32"))
    head = HEAD.replace('[[models]]\nname = "pocket"\n', more + twice)
    monkeypatch.setattr(sys.modules[__name__], "HEAD", head)
    before = store.describe
    rank: dict[str, int] = {}  # number of the model of each cell

    def describe(cell, description):
        (text,) = store.db.execute("SELECT model FROM cells WHERE cell=?", (cell,)).fetchone()
        rank[cell] = names.index(text)
        before(cell, {**description, "width": 8 + (not same_width) * 8 * rank[cell]})

    monkeypatch.setattr(store, "describe", describe)
    run = '[[runs]]\nprotocol = "threshold"\nlengths = [8, 16, 32]\npassages = 4\n'

    def row_of(cell, number):
        C = 10.0 * (1 + rank[cell.key])
        bits = 5.0 * cell.length
        return {"horizon": 0, "mem_bits": max(0.0, bits - C), "information_gain": min(bits, C)}

    data = made(store, run, row_of)
    (plot,) = (p for p in all_plots(data, compare=False) if p.key == "predictors")
    assert len(plot.panels[0].series) == 6
    assert "nan" not in plot.caption
    sentence = " Rank correlation of C with D +1.00 (n 4 models)."
    assert plot.caption.endswith(sentence) is not same_width
    assert ("Rank" in plot.caption) is not same_width


def test_the_last_tokens_of_each_source_have_a_line(store):
    data = frontier(store, ("a/model",), ("random-tokens", "other"))
    (plot,) = protocol_of("usable").figures(data, compare=False)
    (panel,) = plot.panels
    ends = {s.name: s.y[0] for s in panel.series if s.mark == "dashed"}
    here = {"last 1 token, random-tokens": 1.1 / 4, "last 1 token, other": 2.1 / 4}
    assert ends == pytest.approx(here)


@pytest.mark.parametrize(
    ("model", "named"),
    [("meta/llama", "meta/llama"), ("/home/me/my model", "'my model'"), (None, "")],
)
def test_the_page_names_a_model_of_the_hub_in_full_and_a_folder_by_its_last_name(
    model, named, store
):
    data = made(store, ONE, lambda *_: {})
    spec = json.dumps({"toml": "", "model": model})
    store.db.execute("INSERT OR REPLACE INTO meta VALUES ('spec', ?)", (spec,))
    first, *_ = reproduce(data)["commands"]
    assert first == "memvec study run made.toml" + f" --model {named}" * bool(named)
    store.db.execute("INSERT OR REPLACE INTO meta VALUES ('name', 'my study')")
    assert reproduce(read_data(store))["commands"][1] == "memvec study check 'my study.study'"


def test_notes_name_the_cramming_that_is_not_counted(store):
    data = made(store, ONE, lambda *_: {})
    for name in ("transfer", "recurrent", "reading", "sentences"):
        assert f"`{name}`" in cost_table(data).note
    (table,) = protocol_of("transfer").tables(data, compare=False)
    assert "Steps in the origin and those of the pairs are not counted" in table.note


@pytest.mark.parametrize("smallest", [0, 3])
def test_vectors_that_hold_nothing_have_a_report(smallest, store):
    spec = '[[runs]]\nprotocol = "vectors"\nlengths = [8]\nvectors = [1, 2]\npassages = 3\n'
    held = {1: smallest, 2: 6}
    data = made(store, spec, lambda cell, number: {"horizon": held[cell.vectors]})
    table = exact_scaling(data.of("vectors"))
    assert table["longest"].tolist() == [smallest, 6]
    said = scaling_sentence("pocket", table.assign(bits=table["longest"]))
    assert ("100 % of the line" in said) == (smallest == 3)
    for name in ("tables", "figures"):
        getattr(protocol_of("vectors"), name)(data, compare=False)


def lines(data: Data, protocol: str, key: str) -> list[dict[str, Any]]:
    """The lines of a table by its columns; a name that occurs again has a number after it."""
    (table,) = (t for t in protocol_of(protocol).tables(data, compare=False) if t.key == key)
    names = [
        name + str(table.columns[:i].count(name) or "") for i, name in enumerate(table.columns)
    ]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


def spec_of(protocol: str, lengths: list[int], passages: int, more: str = "") -> str:
    return (
        f'[[runs]]\nprotocol = "{protocol}"\nlengths = {lengths}\npassages = {passages}\n{more}\n'
    )


def test_the_number_of_vectors_for_a_book_has_an_interval(store):
    def row_of(cell, number):
        return {"horizon": 4 + 4 * (number % 2), "extra": {"book_tokens": 100}}

    (line,) = lines(made(store, spec_of("book", [8], 6), row_of), "book", "book")
    assert line["vectors for it"] == math.ceil(100 / 6)
    assert line["low1"] < line["vectors for it"] < line["high1"]


def test_removed_bits_are_shares_of_the_bits_without_vectors(store):
    """Vectors, a copy and real context remove bits; a bound says how many would be enough."""
    runs = [spec_of(name, [8], 2) for name in ("paper", "copy", "upper-bound", "context")]
    extras = {
        "copy": {"after_copy": [8.0, 8]},
        "upper-bound": {"least_moved_bits": 6.0, "needed_bits": 15.0},
        "context": {"after_context": {"64": [20.0, 3]}},
    }

    def row_of(cell, number):
        row = {"mem_bits": 10.0, "information_gain": 30.0, "extra": extras.get(cell.protocol, {})}
        return row | {"accuracy": 0.9 + number / 10}

    data = made(store, "".join(runs), row_of)
    (caption,) = (
        plot.caption
        for plot in protocol_of("threshold").figures(data, compare=False)
        if plot.key == "per-token"
    )
    assert "The vectors remove 75 to 75 % of the bits" in caption
    copies = lines(data, "copy", "copy")
    assert [(line["removed by vectors"], line["removed by copy"]) for line in copies] == [
        (30, 32),
        (30, 32),
    ]
    assert [(line["passages"], line["n"]) for line in copies] == [
        ("all", 2),
        ("accuracy ≥ 0.99", 1),
    ]
    (bound,) = lines(data, "upper-bound", "upper-bound")
    shares = ("least moved / removed, %", "raised logit / removed, %")
    assert [bound[name] for name in shares] == [20, 50]
    (figure,) = protocol_of("context").figures(data, compare=False)
    assert figure.caption.startswith("In 1 of 1 cases")


def test_a_passage_that_took_all_steps_of_the_recipe_counts_as_cut(store):
    run = spec_of("paper", [8], 3, "recipe = { steps = %d }")
    data = made(store, run % 9 + run % 10, lambda cell, number: {"steps": 9})
    found = lines(data, "threshold", "threshold")
    assert {line["text"].split()[-1]: line["cut"] for line in found} == {"9": "100 %", "10": "0 %"}


def test_a_passage_at_several_lengths_is_one_in_the_interval_of_the_threshold(store):
    row = {"accuracy": 0.5, "mem_bits": 10.0}
    data = made(store, spec_of("paper", [8, 16], 3), lambda cell, number: dict(row))
    (line,) = (line for line in lines(data, "threshold", "threshold") if line["text"] == "all")
    assert (line["n"], line["passages"]) == (6, 3)


def test_the_width_of_vectors_in_a_space_is_that_of_the_stored_ones(store, monkeypatch):
    """Vectors of made rows have 8 numbers; inputs of the model would have 32."""
    monkeypatch.setitem(MODEL, "width", 32)
    run, space = "vectors = [1, 3]\n", 'recipe = { space = "prefix", start_rule = "bos" }'
    data = made(
        store,
        spec_of("exact", [4, 6], 1, run) + spec_of("exact", [4, 6], 1, run + space),
        lambda cell, number: {},
    )
    widths = {
        name: set(rows.apply(data.width, axis=1)) for name, rows in data.rows.groupby("series")
    }
    assert sorted(map(tuple, widths.values())) == [(8,), (32,)]


def test_mapped_vectors_are_exact_at_once_if_all_tokens_are_right(store):
    more = 'options = { origin = "pocket" }'

    def row_of(cell, number):
        extra = {"mapped": [], "at_once": [0, 3, 4][number], "steps_mapped": 3, "exact_mapped": 1}
        extra |= {"cosine": 0.5, "explained": 0.25, "pairs": 9, "origin_weights": "w"}
        return {"extra": extra}

    (line,) = lines(made(store, spec_of("transfer", [4], 3, more), row_of), "transfer", "transfer")
    assert line["exact at once"].startswith("33 % [")
    assert (line["steps"], line["steps from the map"], line["ratio"]) == (9, 3, 1 / 3)


@pytest.mark.parametrize("limit", [0, 2])
def test_every_pair_of_restarts_is_measured_again_or_as_many_as_asked(limit, store, monkeypatch):
    """Pairs of another model are not those of this one."""
    other = '[[models]]\nname = "a/model"\n'
    made(store, other + spec_of("geometry", [4], 3, "seeds = [0, 1]"), lambda cell, number: {})
    cells = store.db.execute("SELECT cell FROM cells ORDER BY model, seed").fetchall()
    for (first,), (second,) in (cells[:2], cells[2:]):
        for number in range(3):
            store.put_path(first, second, number, [1.0, 1.0])
    again = lambda *_: ([1.0, 0.0], [0.1, 0.1])  # noqa: E731
    monkeypatch.setattr(type(protocol_of("geometry")), "recompute_between", again)
    of, worst = ModelKey("pocket", None, "auto", None), {}
    wrong = check_pairs(tiny(), store, of, limit, worst)
    assert len(wrong) == (limit or 3)
    assert worst == {"paths": 1.0}
    assert all(f"passage {i}:" in sentence for i, sentence in enumerate(wrong))


def test_the_reach_of_a_memory_is_that_of_half_of_the_documents(store):
    spec = spec_of(
        "recurrent", [8, 16], 4, 'vectors = [2]\noptions = { encoder = "e.safetensors" }'
    )

    def row_of(cell, number):
        back = [4 * (number < 2), 0, 4, 0][: cell.length // 4]
        extra = {"segment": 4, "back": back, "right": [4] * len(back), "alone": [4, 0, 4, 0]}
        extra["alone"] = extra["alone"][: len(back)]
        return {"extra": extra, "horizon": 6}

    data = made(store, spec, row_of)
    chains = list(chains_of(data.of("recurrent")))
    assert [chain.reach for chain in chains] == [1, 1]
    assert [chain.alone.mean for chain in chains] == [1, 1]  # 4 of 8, and 8 of 16, over 2 and K
    assert [lag.right for chain in chains for lag in chain.lags] == [1.0] * 6
    (card,) = protocol_of("recurrent").cards(data)
    assert card.value == "1 of 4 segments"


def test_spaces_are_compared_by_their_longest_passages(store):
    spec = spec_of("spaces", [4, 8], 3, 'storage = "float32"')
    spec += spec_of("spaces", [8], 3, 'storage = "bfloat16"')

    def row_of(cell, number):
        half = cell.storage == "bfloat16"
        kl = [1.0, 4.0] if cell.length == 8 else [9.0, 9.0]
        extra = {"space": "inputs", "numbers": 8, "words": [], "kl": kl}
        return {"horizon": (6 if half else 8) if cell.length == 8 else 2, "extra": extra}

    data = made(store, spec, row_of)
    whole, half = lines(data, "spaces", "spaces")
    assert (whole["exact tokens"], half["exact tokens"]) == (8, 6)
    assert (whole["bits / number"], half["bits / number"]) == (5 * 8 / 8, 5 * 6 / 8)
    assert whole["KL / nothing"] == half["KL / nothing"] == 0.25
    (card,) = protocol_of("spaces").cards(data)
    assert card.value == "8.0 tokens"


def test_spaces_of_several_texts_and_recipes_are_told_apart(store):
    """The recipe is in a name only where nothing else tells two lines apart."""
    head = '[[sources]]\nkind = "random-words"\n'
    spec = head + spec_of("spaces", [4], 3, "recipe = { steps = 9 }")
    spec += spec_of("spaces", [4], 3, 'recipe = { steps = 7 }\nsources = ["random-tokens"]')

    def row_of(cell, number):
        return {"extra": {"space": "inputs", "numbers": 8, "words": [], "kl": [1.0, 4.0]}}

    data = made(store, spec, row_of)
    sources = [line["source"] for line in lines(data, "spaces", "spaces")]
    assert sorted(sources)[-1] == "random-words"
    assert len(set(sources)) == 3
    (figure,) = protocol_of("spaces").figures(data, compare=False)
    for panel in figure.panels:
        assert sorted(s.name for s in panel.series) == sorted(f"{s}, inputs" for s in sources)


def test_the_card_on_use_is_of_exact_vectors_only(store):
    """The caption counts intervals of the KL ratio below 1, and lengths that are exact."""
    kl_of = {8: [2.0] * 3, 16: [1.0] * 3, 32: [0.5, 1.0, 6.0]}

    def row_of(cell, number):
        kl = kl_of[cell.length][number]
        contexts = {"vectors": [kl, 2.0], "nothing": [4.0, 4.0], "text": [0.0, 1.0]}
        extra = {"contexts": contexts, "rms": 1.0, "layers": {}, "directions": {}, "words": []}
        return {"extra": extra, "horizon": min(cell.length, 20)}

    data = made(store, spec_of("usable", [8, 16, 32], 3), row_of)
    (card,) = protocol_of("usable").cards(data)
    assert card.value == "0.25 × KL"
    found = lines(data, "usable", "usable")
    assert [line["KL/nothing"] for line in found] == [0.5, 0.25, 0.625]
    assert [line["kept"] for line in found] == pytest.approx([2 / 3] * 3)
    (figure,) = protocol_of("usable").figures(data, compare=False)
    assert "in 2 the whole interval of the KL ratio is below 1" in figure.caption
    assert "in 2 every passage is exact" in figure.caption


def test_layers_and_spans_are_compared_with_the_whole_vectors(store):
    more = "vectors = [2]\noptions = { layers = true, directions = true }"
    layers = {"none": [8.0, 3.0, 1.0], "0": [2.0, 1.0, 2.0], "1": [6.0, 2.0, 4.0]}
    layers |= {"0+": [0.0, 0.0, 8.0], "1+": [6.0, 2.0, 4.0]}
    left = {"whole": [8.0, 3.0, 1.0], "without text": [0.0, -1.0, 1.5]}  # of an earlier version
    left |= {"without use": [5.0, 2.0, 2.5]}
    spans = left | {"text in use": [0.5], "use in text": [0.25]}

    def row_of(cell, number):
        contexts = {"vectors": [1.0, 2.0], "nothing": [4.0, 4.0], "text": [0.0, 1.0]}
        extra = {"contexts": contexts, "rms": 1.0, "layers": layers, "directions": spans}
        return {"extra": extra | {"words": []}}

    data = made(store, spec_of("usable", [8], 3, more), row_of)
    found = lines(data, "usable", "usable-layers")
    assert {line["without"]: line["KL / whole"] for line in found} == {
        name: kl for name, (_, _, kl) in layers.items()
    }
    found = lines(data, "usable", "usable-directions")
    assert {line["vectors"]: (line["tokens"], line["KL"]) for line in found} == {
        name: (tokens, kl) for name, (tokens, _, kl) in left.items()
    }
    for line in found:
        shares = (line["chance"], line["text in use"], line["use in text"])
        assert shares == (8 / (2 * 8), 0.5, 0.25)
    _, figure = protocol_of("usable").figures(data, compare=False)
    assert "needs layer 0 most" in figure.caption
    assert "context mode needs layer 1 most (KL 4.00 times" in figure.caption


def test_the_table_of_reading_compares_with_all_layers_and_counts_rank_one(store):
    cut = {"none": [8.0, 1.0], "0": [4.0, 0.5], "1": [2.0, 0.5], "0+": [0.0, 0.0], "1+": [2.0, 0.0]}
    path = {"x": [0.0, 1.0], "y": [0.0, 1.0], "leading": [0, 8], "explained": 1.0}

    def row_of(cell, number):
        lens = [[5.0, 1.0 + number, 7.0], [0.5, 1.0, 7.0]]
        return {"extra": {"attention": [0.1, 0.2], "cut": cut, "lens": lens, "path": path}}

    found = lines(made(store, spec_of("reading", [8], 3), row_of), "reading", "reading")
    assert [line["arg-max right"] for line in found] == ["1 of 3", "3 of 3"]
    assert [line["left without it"] for line in found] == [0.5, 0.25]
    assert [line["left without it and above"] for line in found] == [0, 0.25]


def test_the_ratio_of_a_transfer_divides_steps_from_a_map_by_those_from_the_start(store):
    more = 'options = { origin = "pocket", origin_seed = %d }'
    spec = spec_of("transfer", [4, 8], 3, more % 0) + spec_of("transfer", [8], 3, more % 1)

    def row_of(cell, number):
        steps = 3 * (1 + cell.options["origin_seed"]) * cell.length
        extra = {"at_once": 2, "steps_mapped": steps, "cosine": 0.5, "explained": 0.5, "pairs": 9}
        extra["origin_weights"] = "w"
        return {"extra": extra, "steps": 48}

    found = lines(made(store, spec, row_of), "transfer", "transfer")
    assert [(line["from"], line["tokens"], line["ratio"], line["n"]) for line in found] == [
        ("pocket", 4, 0.25, 3),
        ("pocket", 8, 0.5, 3),
        ("pocket, seed 1", 8, 1.0, 3),
    ]


def test_rows_of_two_origins_of_one_name_are_told_apart(store):
    """A model may have been trained again between two runs of a study."""

    def row_of(cell, number):
        extra = {"at_once": 2, "steps_mapped": 3, "cosine": 0.5, "explained": 0.5, "pairs": 9}
        return {"extra": extra | {"origin_weights": ["old", "new"][number == 2]}}

    spec = spec_of("transfer", [4], 3, 'options = { origin = "pocket" }')
    found = lines(made(store, spec, row_of), "transfer", "transfer")
    assert sorted((line["from"], line["n"]) for line in found) == [
        ("pocket, weights new", 1),
        ("pocket, weights old", 2),
    ]


def test_the_gain_of_a_predicted_latent_is_a_share_of_that_of_its_text(store):
    spec = spec_of("sentences", [8], 3, 'options = { latents = "s.safetensors", context = 2 }')

    def row_of(cell, number):
        bits = dict.fromkeys(evaluate.WAYS, 40.0)
        bits |= {"predicted": 30.0, "text": 20.0, "full": 10.0, "discretised": 35.0}
        extra = {"bits": bits, "continuous": [38.0], "discretised": [39.0], "encoded_exact": 1}
        extra |= {"flops": dict.fromkeys(COSTS, 1.0), "before_exact": [[0, 1], [1, 1]]}
        return {"extra": extra | {"sizes": [1, 1]}, "before": (3, 4, 5), "lm_bits": 40.0}

    data = made(store, spec, row_of)
    (card,) = protocol_of("sentences").cards(data)
    assert card.value.startswith("50 %")
    ahead = lines(data, "sentences", "sentences-ahead")
    assert [(line["regime"], line["bits / token"] * 8) for line in ahead] == [
        ("continuous", 30),
        ("continuous", 38),
        ("discretised", 35),
        ("discretised", 39),
    ]


def test_a_very_long_name_of_a_recipe_is_a_number(tmp_path):
    """The name of a part with a long argument would leave no room in a figure."""
    runs = "".join(
        f"{ONE}recipe = {{ queries = '{letter * length}', preset = 'usable' }}\n"
        for letter, length in (("a", 9), ("b", MAX_NAME))
    )
    with Store(tmp_path, write=True) as store:
        data = made(store, runs, lambda cell, number: {})
    names = data.rows["recipe"].tolist()
    assert names == ["queries aaaaaaaaa", "recipe 2"]


def test_figures_do_not_change_a_callers_matplotlib_and_accept_any_name(tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "backend", "svg")
    before, names = dict(mpl.rcParams), ["$x_{$", r"\frac $a$"]
    series = [Series(name, [0.0, 1.0], [1.0, 2.0]) for name in names]
    panel = Panel("$_$", "x", "y", series, names=names)
    draw_all([Plot("plot", "$100 to $200_$", "", [panel])], tmp_path)
    assert dict(mpl.rcParams) == before
    drawn = (tmp_path / "plot.svg").read_text("utf-8")
    assert all(text in drawn for text in (*names, "$100 to $200_$", "$_$"))


def test_the_table_of_copies_has_columns_for_the_vectors_and_the_copy(tmp_path):
    with Store(tmp_path, write=True) as store:
        data = made(
            store,
            '[[runs]]\nprotocol = "copy"\nlengths = [4]\npassages = 2\n',
            lambda cell, number: {"extra": {"after_copy": [2.0, 1]}},
        )
        (table,) = protocol_of("copy").tables(data, compare=False)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["accuracy, vectors"], row["accuracy, copy"]) == (1.0, 0.25)
    assert (row["removed by vectors"], row["removed by copy"]) == (20.0, 18.0)


def test_published_copies_and_contexts_are_those_of_the_same_text(store, monkeypatch):
    """The copies are of random words, the contexts of PG-19; nats are converted to bits."""
    head = HEAD.replace("pocket", "EleutherAI/pythia-410m").replace("random-tokens", "pg19")
    monkeypatch.setattr(
        sys.modules[__name__], "HEAD", f'{head}[[sources]]\nkind = "random-words"\n'
    )
    run = '[[runs]]\nprotocol = "{}"\nlengths = [64]\npassages = 2\nsources = ["{}"]\n'
    run += "vectors = [1, 2]\n"
    spec = "".join(
        run.format(name, text) for name in ("copy", "context") for text in ("pg19", "random-words")
    )
    extras = {"copy": {"after_copy": [2.0, 1]}, "context": {"after_context": {"64": [20.0, 3]}}}
    data = made(store, spec, lambda cell, number: {"extra": extras[cell.protocol]})
    (table,) = protocol_of("context").tables(data, compare=True)
    theirs = {(row[1], row[4]): row[-1] for row in table.rows}
    assert theirs["pg19", "64 tokens"] == pytest.approx(206.5 / math.log(2))
    assert theirs["pg19", "1 vector"] == pytest.approx(15.4 / math.log(2))
    assert theirs["pg19", "2 vectors"] is None
    assert {theirs[key] for key in theirs if key[0] == "random-words"} == {None}
    ((panel, two),) = (plot.panels for plot in protocol_of("copy").figures(data, compare=True))
    assert not [line.name for line in two.series if "published" in line.name]
    series = {line.name: line for line in panel.series}
    vector, copy = series["vector, published"], series["copy in context, published"]
    assert vector.x == copy.x
    bits = [n / math.log(2) for n in (126.1, 115.1, 109.0)]
    assert [vector.x[0], vector.y[0], copy.y[0]] == pytest.approx(bits)
    (plot,) = protocol_of("copy").figures(data, compare=False)
    names = [line.name for panel in plot.panels for line in panel.series]
    assert not [name for name in names if "published" in name]


@pytest.mark.parametrize("loaded", ["", 'quantize = "8bit"'])
@pytest.mark.parametrize(
    ("protocol", "model", "fields"),
    [
        ("one-step", "meta-llama/Llama-3.2-1B", "lengths = [4]\nvectors = [2]"),
        (
            "one-step-arrangements",
            "meta-llama/Llama-3.2-1B",
            'lengths = [4]\nvectors = [2]\narrangement = "pairs"',
        ),
        ("threshold", "EleutherAI/pythia-160m", "lengths = [4]"),
        ("paper", "meta-llama/Llama-3.2-1B", "lengths = [4, 8]"),
        ("paper", "meta-llama/Llama-3.2-1B", "lengths = [4]\nvectors = [1, 2]"),
        ("vectors", "meta-llama/Llama-3.2-1B", "lengths = [4]\nvectors = [1, 2]"),
        ("context", "EleutherAI/pythia-410m", "lengths = [64]\ncontexts = [64]"),
        ("exact", "meta-llama/Llama-3.2-1B", "lengths = [4]"),
        ("book", "meta-llama/Llama-3.1-8B", "lengths = [4]"),
    ],
)
def test_published_values_are_found_by_the_models_full_name(
    protocol, model, fields, loaded, store, monkeypatch
):
    """Tables name the model by its last part. Quantized weights are not those of a publication.

    The protocol `vectors` reports several K of the protocol `paper`, too.
    """
    head = HEAD.replace('"pocket"', f'"{model}"\n{loaded}').replace("random-tokens", "pg19")
    monkeypatch.setattr(sys.modules[__name__], "HEAD", head)
    extra = {"after_context": {"64": [20.0, 3]}, "decode_seconds": None, "book_tokens": 90}
    reporting = "vectors" if "vectors = [1, 2]" in fields else protocol
    run = f'[[runs]]\nprotocol = "{protocol}"\n{fields}\npassages = 2\n'
    passed = "[4, 8]" in fields  # the shorter length
    accuracy = {4: 1.0 if passed else 0.9, 8: 0.9, 64: 0.9}
    data = made(
        store, run, lambda cell, number: {"extra": extra, "accuracy": accuracy[cell.length]}
    )
    of_paper = [
        value
        for table in protocol_of(reporting).tables(data, compare=True)
        for row in table.rows
        for column, value in zip(table.columns, row, strict=True)
        if column.startswith(("paper", "published")) and value is not None
    ]
    plots = [*protocol_of(reporting).figures(data, compare=True)]
    if reporting == "paper":
        plots += [utilisation_figure(data, compare=True), lengths(data, compare=True)]
    in_figures = {
        plot.key
        for plot in plots
        for panel in plot.panels
        for series in panel.series
        if series.name.endswith("published")
    }
    # Exact horizons are of another rule than the published values of several K.
    assert bool(of_paper or in_figures) == (not loaded and protocol != "vectors")
    if protocol == "paper":
        assert bool(of_paper) == (not loaded)
    if reporting == "paper":
        assert in_figures == (set() if loaded else {"accuracy", "utilisation", "lengths"})


def test_the_table_of_the_documented_protocol_has_a_mean_over_passages(store, monkeypatch):
    """The protocol is the example of docs/howto/add-protocol.md."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})
    page = Path(__file__).parent.parent / "docs" / "howto" / "add-protocol.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, str(page), "exec"), {})
    spec = spec_of("hardest-token", [4, 8], 3)
    data = made(store, spec, lambda cell, number: {"extra": {"hardest": cell.length + number}})
    found = lines(data, "hardest-token", "hardest-token")
    assert [(line["length"], line["bits"], line["n"]) for line in found] == [(4, 5, 3), (8, 9, 3)]
    assert all(line["low"] < line["bits"] < line["high"] for line in found)
