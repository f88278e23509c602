"""Studies: specs, prices, runs that are stopped and continued, the store, the check, exports."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config

from conftest import passages, reader, tiny
from memvec.cli.progress import study_progress
from memvec.cli.study import _pool_maker, ls, validate
from memvec.cli.study_results import check, export, report, vectors
from memvec.cli.study_tables import print_prices
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import position_scores
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors
from memvec.errors import MemvecError
from memvec.lab.protocols.geometry import Geometry
from memvec.lab.protocols.lookup import protocol_names, protocol_of
from memvec.lab.protocols.protocol import Compared
from memvec.lab.report.data import read_data
from memvec.lab.report.report import write_report
from memvec.lab.sources import SourcedPassage
from memvec.lab.sources.random_tokens import RandomTokens
from memvec.lab.study import check as check_module
from memvec.lab.study import run as run_module
from memvec.lab.study import stored_model
from memvec.lab.study.cells import expand
from memvec.lab.study.check import check_study
from memvec.lab.study.export import export_rows
from memvec.lab.study.facts import facts_of_name
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.price import Price, hours, max_tokens, price, problems
from memvec.lab.study.recompute import Slow, SlowPassage, _spent
from memvec.lab.study.recompute import _alone as check_alone
from memvec.lab.study.row import Row
from memvec.lab.study.run import StudyStatus, run_study
from memvec.lab.study.schema import COLUMNS
from memvec.lab.study.spec import ModelSpec, Spec, parse_spec, read_spec
from memvec.lab.study.store import Store
from memvec.lab.study.stored_model import cell_of
from memvec.lab.study.vector_files import export_vectors
from memvec.lab.study.work import find_passages
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, ids_hash
from memvec.vectors import MemVectors
from memvec.workers import Loading
from studies import HEAD, SENTENCES, everything, maker, run, spec_in

SPECS = sorted((Path(__file__).parent.parent / "studies").glob("*.toml"))
RUN = '[[runs]]\nprotocol = "exact"\nlengths = [8]\n'
DTYPES = ("float32", "bfloat16")

# ---------------------------------------------------------------------- specs

WRONG = [
    ("lenghts = [8]", "lenghts", "did you mean 'lengths'"),
    ('protocol = "exacct"\nlengths = [8]', "exacct", "did you mean 'exact'"),
    ('protocol = "exact"\nlengths = [8]\nsources = ["bok"]', "missing source 'bok'", "'book'"),
    ('protocol = "exact"\nlengths = [8]\nmodels = ["tinny"]', "missing model 'tinny'", "'tiny'"),
    ('protocol = "exact"\nlengths = [8]\npassages = -2', "passages must be", "at least 1, not -2"),
    ('protocol = "exact"\nlenghts = [8]', "unknown key 'lenghts' in runs [1]", "mean 'lengths'"),
    ('protocol = "exact"\nlengths = [0]', "lengths", "at least 1"),
    ('protocol = "exact"\nlengths = [8]\ncontexts = [4]', "contexts", "context"),
    ('protocol = "exact"\nlengths = [8]\nrecipe = { corrections = 2 }', "corrections", "must be 0"),
    ('protocol = "exact"\nlengths = "eight"', "lengths must be a list", "eight"),
    ('protocol = "exact"\nlengths = []', "lengths must have at least one value", ""),
    ('protocol = "exact"\nlengths = [true]', "must be a whole number", "True"),
    ('protocol = "exact"\nlengths = [9999999999999999]', "lengths must be at most 1000000", ""),
    ('protocol = "exact"\nlengths = [8]\nseeds = [9223372036854775808]', "64 bits", ""),
    ('protocol = "exact"\nlengths = [8]\nbudget = -1', "budget must be at least 0", ""),
    ('protocol = "exact"\nlengths = [8]\nrecipe = 3', "must be a table such as { steps", ""),
    ('protocol = "exact"', "needs 'lengths'", ""),
    ('protocol = "usable"\nlengths = [8]\nseeds = [0, 1]', "vectors of one start", "of seeds"),
    ('protocol = "spaces"\nlengths = [8]\nseeds = [0, 1]', "vectors of one start", "of seeds"),
    ('protocol = "geometry"\nlengths = [8]\nrecipe = { start = "encoder" }', "restarts", "start"),
    ('protocol = "geometry"\nlengths = [8]\nrecipe = { space = "prefix" }', "lines", "'inputs'"),
    (
        'protocol = "context"\nlengths = [8]\ncontexts = [0]',
        "contexts [1] must be",
        "than 0, not 0",
    ),
    ('protocol = "context"\nlengths = [8]\ncontexts = 4', "option contexts must be a list", "4"),
    ('protocol = "exact"\nlengths = [8]\noptions = { x = 1 }', "has no option 'x'", "leave it out"),
    ('protocol = "context"\nlengths = [8]\noptions = { contxts = [4] }', "contxts", "'contexts'?"),
    ('protocol = "exact"\nlengths = [8]\nrecipe = { seed = 3 }', "recipe's seed", "leave it out"),
    ('protocol = "context"\nlengths = [8]\noptions = 3\ncontexts = [4]', "options must be", ""),
    (
        'protocol = "one-step-groups"\nlengths = [8]\nvectors = [2]\ngroup = 4.0\npassages = 4',
        "option group",
        "must be a whole number, not 4.0",
    ),
]


@pytest.mark.parametrize(("text", "what", "hint"), WRONG)
def test_a_wrong_spec_is_refused_in_one_sentence(text: str, what: str, hint: str) -> None:
    block = f"[[runs]]\n{text}" if "protocol" in text else f"{RUN}{text}"
    with pytest.raises(MemvecError) as found:
        parse_spec(HEAD + block, "spec")
    sentence = str(found.value)
    assert what in sentence
    assert hint in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("chunk_words = [3]", "sources [2].chunk_words needs more than 1 value."),
        ('chunk_words = ["a", 3]', "chunk_words [1] must be a whole number, not 'a'."),
        ("chunk_words = [1, 2, 3]", "chunk_words must have at most 2 values, not [1, 2, 3]."),
        ("seed = true", "sources [2].seed must be a whole number, not True."),
        ('bos = "no"', "sources [2].bos must be true or false, not 'no'."),
        ("where = 3", 'where must be a table such as { split = "valid" }, not 3.'),
    ],
)
def test_a_wrong_source_is_refused_with_the_keys_of_the_spec(text: str, sentence: str) -> None:
    head = HEAD.replace("chunk_words = [40, 80]", text)
    assert head != HEAD
    with pytest.raises(MemvecError) as raised:
        parse_spec(head + RUN, "spec")
    assert sentence in str(raised.value)


def test_a_spec_that_a_run_would_refuse_is_refused_before_it() -> None:
    """A device, a table of another type, a recipe (with its run), a revision, a source."""
    with pytest.raises(MemvecError, match="unknown device 'gpu': use auto, cpu or cuda:0"):
        parse_spec('device = "gpu"\n' + HEAD + RUN, "spec")
    with pytest.raises(MemvecError, match="fixed_shapes must be true or false, not 'no'"):
        parse_spec('fixed_shapes = "no"\n' + HEAD + RUN, "spec")
    with pytest.raises(MemvecError, match=r"models \[1\] must be a table, not 'tiny'"):
        parse_spec('name = "x"\nmodels = ["tiny"]\n' + RUN, "spec")
    with pytest.raises(MemvecError, match=r"run 2 \(exact\): a recipe has no 'stepps'"):
        expand(parse_spec(HEAD + RUN + RUN + "recipe = { stepps = 4 }", "spec"))
    with pytest.raises(MemvecError, match=r"run 1 \(exact\): the recipe's budget does nothing"):
        expand(parse_spec(HEAD + RUN + "budget = 9\nrecipe = { budget = 5 }", "spec"))
    text = HEAD.replace('name = "tiny"', 'name = "pocket"\nrevision = "main"')
    spec = parse_spec(text + RUN, "spec")
    sentences = problems(spec, expand(spec), None)
    assert any("only models of the Hub have a revision" in s for s in sentences)
    hub = parse_spec(text.replace('kind = "random-tokens"', 'kind = "hub"') + RUN, "spec")
    assert "source 'hub' needs a dataset, or a path." in problems(hub, expand(hub), None)


def test_a_price_without_hours_says_that_the_model_is_looked_for_on_the_hub(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_prices(
        "x",
        [
            Price("nosuch", 1, 2, gpu_hours=None, cpu_hours=None, memory_gib=None),
            Price("small", 1, 2, gpu_hours=0.0, cpu_hours=0.004, memory_gib=0.005),
        ],
        ["x is missing."],
    )
    printed = capsys.readouterr().out
    assert re.search(r"small .* 0\.00 .* < 0\.01 .* 0\.01 GiB", printed)
    assert "no folder is called nosuch; the run looks for it on the Hub." in printed
    assert "problem: x is missing." in printed


def test_wrong_kinds_keys_dtypes_and_recipes_are_named() -> None:
    with pytest.raises(MemvecError, match=r"unknown kind 'pg91'.*did you mean 'pg19'"):
        parse_spec(HEAD.replace("random-tokens", "pg91") + RUN, "spec")
    with pytest.raises(MemvecError, match=r"unknown key 'pth' in sources .2.: did you mean 'path'"):
        parse_spec(HEAD.replace("path =", "pth =") + RUN, "spec")
    with pytest.raises(MemvecError, match="a recipe has no 'stepps': did you mean 'steps'"):
        expand(parse_spec(HEAD + RUN + "recipe = { stepps = 4 }", "spec"))
    with pytest.raises(MemvecError, match="layer does nothing where space is 'inputs'"):
        expand(parse_spec(HEAD + RUN + "recipe = { layer = 1 }", "spec"))
    with pytest.raises(MemvecError, match="recipe's steps must be a whole number, not 'True'"):
        expand(parse_spec(HEAD + RUN + "recipe = { steps = true }", "spec"))
    with pytest.raises(MemvecError, match=r"runs is a list of tables: write \[\[runs\]\]"):
        parse_spec(HEAD + RUN.replace("[[runs]]", "[runs]"), "spec")
    with pytest.raises(MemvecError, match="unknown dtype 'float33' of tiny: did you mean"):
        parse_spec(HEAD.replace('"tiny"', '"tiny"\ndtype = "float33"') + RUN, "spec")
    with pytest.raises(MemvecError, match="quantize must be '8bit' or '4bit', not '3bit'"):
        parse_spec(HEAD.replace('"tiny"', '"tiny"\nquantize = "3bit"') + RUN, "spec")
    with pytest.raises(MemvecError, match="is not TOML"):
        parse_spec("name = ", "spec")


def test_a_model_that_replaces_others_is_loaded_as_they_all_are() -> None:
    half = HEAD.replace('"tiny"', '"tiny"\ndtype = "bfloat16"\nquantize = "8bit"')
    (model,) = parse_spec(half + RUN, "spec", model="pocket").models
    assert (model.dtype, model.quantize) == ("bfloat16", "8bit")
    both = half + '[[models]]\nname = "other"\n' + RUN
    (model,) = parse_spec(both, "spec", model="pocket").models
    assert (model.dtype, model.quantize) == ("auto", None)


def test_cells_of_quantized_weights_are_other_cells() -> None:
    """The setting is not in the keys of other cells, which are those of earlier studies."""
    (plain,) = expand(parse_spec(HEAD + RUN + 'sources = ["random-tokens"]\n', "spec"))
    assert "quantize" not in plain.cell.settings()
    few_bits = replace(plain.cell, quantize="4bit")
    assert few_bits.key != plain.cell.key
    assert few_bits.settings() == plain.cell.settings() | {"quantize": "4bit"}


@pytest.mark.parametrize("workers", [0, 2])
def test_models_of_a_study_are_loaded_as_spec_and_options_say(workers, monkeypatch, capsys) -> None:
    """A line says which model runs, with workers, too."""
    asked: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append({"name": name, **options})
        lm = copy.copy(reader())
        lm.quantize = options["quantize"]
        return lm

    def of_workers(loading: Loading, **options: Any) -> Any:
        lm = load(loading.name, revision=loading.revision, dtype=loading.dtype, **loading.options)
        asked[-1]["device"] = options["device"]
        return SimpleNamespace(call=lambda function: function(lm))

    monkeypatch.setattr("memvec.loading.load_lm", load)
    monkeypatch.setattr("memvec.lab.study.remote.Workers", of_workers)
    text = HEAD.replace('"tiny"', '"tiny"\nrevision = "r1"\ndtype = "float32"\nquantize = "8bit"')
    (model,) = parse_spec(text + RUN, "spec").models
    given = ["checkpointing", "device_map=auto"]
    _pool_maker("cpu", workers, None, given)(model)
    chosen = {"name": "tiny", "revision": "r1", "device": "cpu", "dtype": "float32"}
    options = {"quantize": "8bit", "checkpointing": True, "device_map": "auto"}
    assert asked == [chosen | options]
    assert "float32, quantized to 8bit on cpu" in capsys.readouterr().err
    with pytest.raises(
        MemvecError, match=r'write quantize = "4bit" there, under \[\[models\]\]\.$'
    ):
        _pool_maker("cpu", workers, None, ["quantize=4bit"])
    with pytest.raises(MemvecError, match=r"^--load takes .*, not 'quantise=4bit'") as raised:
        _pool_maker("cpu", workers, None, ["quantise=4bit"])
    assert "quantize" not in str(raised.value)


def test_a_model_is_in_a_spec_once_for_each_way_to_load_it_and_sources_need_names() -> None:
    def with_twin(more: str) -> str:
        return HEAD.replace("[[models]]", f'[[models]]\nname = "tiny"\n{more}\n[[models]]') + RUN

    for more in ('quantize = "8bit"', 'dtype = "bfloat16"', 'revision = "step1"'):
        spec = parse_spec(with_twin(more), "spec")
        one, other = (p.cell.model_key for p in expand(replace_sources(spec)))
        assert one.name == other.name == "tiny"
        assert one != other
        # --model replaces the name in each way to load it.
        ways = dict.fromkeys((model.dtype, model.quantize) for model in spec.models)
        replaced = parse_spec(with_twin(more), "spec", model="pocket").models
        assert [(m.name, (m.dtype, m.quantize)) for m in replaced] == [("pocket", w) for w in ways]
    for more in ("", 'dtype = "auto"', 'revision = "main"'):  # 'main' is the Hub's default
        with pytest.raises(MemvecError, match=r"'tiny' is there twice: .*dtype, quantize\)\.$"):
            parse_spec(with_twin(more), "spec")
    sources = '[[sources]]\nkind = "sampled"\n' * 2
    with pytest.raises(MemvecError, match=r"two sources are called 'sampled': give one a name\.$"):
        parse_spec(HEAD + sources + RUN, "spec")


def test_prices_say_how_models_of_one_name_are_loaded() -> None:
    text = HEAD.replace("[[models]]", '[[models]]\nname = "tiny"\nquantize = "8bit"\n[[models]]')
    planned = expand(replace_sources(parse_spec(text + RUN, "spec")))
    found = [(p.model, p.loaded, p.cells) for p in price(planned)]
    assert found == [("tiny", "8bit", 1), ("tiny", "", 1)]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memvec.cli.display.out", Console(file=out, width=200))
        print_prices("small", price(planned), [])
    assert "tiny, 8bit " in out.getvalue()


def replace_sources(spec: Spec) -> Spec:
    """The same spec with its first source, which needs no file."""
    return spec.model_copy(update={"sources": spec.sources[:1]})


@pytest.mark.slow
def test_a_model_is_compared_with_itself_in_another_dtype(
    folder, tmp_path, capsys, monkeypatch
) -> None:
    """Each cell is crammed, checked, exported and reported with the model of its own dtype.

    Passages of one dtype are not expected of the other: the model's own text may differ there.
    """
    models = "".join(f'[[models]]\nname = "{folder}"\ndtype = "{d}"\n' for d in DTYPES)
    text = f'name = "s"\n{models}[[sources]]\nkind = "sampled"\n'
    text += '[[runs]]\nprotocol = "exact"\nlengths = [3]\npassages = 2\nrecipe = { steps = 9 }\n'
    text += '[[runs]]\nprotocol = "geometry"\nlengths = [3]\nseeds = [0, 1]\npassages = 1\n'
    spec = parse_spec(text + "recipe = { steps = 9 }\n", "spec")
    loaded, out = [], tmp_path / "s.study"

    def pool(model: ModelSpec) -> LocalPool:
        loaded.append(model.dtype)
        with Store(out) as store:
            of_model = "SELECT cell FROM cells WHERE json_extract(settings, '$.dtype') = ?"
            for (cell,) in store.db.execute(of_model, (model.dtype,)).fetchall():
                assert store.known_passages(cell) == {}
        return LocalPool(load_lm(model.name, dtype=model.dtype))

    run_study(spec, out, pool)
    assert loaded == list(DTYPES)
    run_study(spec, out, pool)
    assert loaded == list(DTYPES)  # nothing is left to do
    with Store(out) as store:
        cells = store.db.execute(
            "SELECT json_extract(settings, '$.dtype'), json_extract(description, '$.dtype') "
            "FROM cells"
        ).fetchall()
        data = read_data(store)
    assert sorted(cells) == sorted((d, d) for d in DTYPES for _ in range(3))
    names = [f"tiny, {d}" for d in DTYPES]
    assert list(data.models) == list(dict.fromkeys(data.rows["model"])) == names
    (table, *_) = protocol_of("exact").tables(data, compare=True)
    assert [row[0] for row in table.rows] == names
    between, asked = Geometry.recompute_between, []

    def counted(self: Geometry, lm: FrozenLM, *arguments: Any) -> Any:
        asked.append(str(lm.dtype).removeprefix("torch."))
        return between(self, lm, *arguments)

    monkeypatch.setattr(Geometry, "recompute_between", counted)
    found = check_study(out)
    assert (found["rows"], found["wrong"], asked) == (8, [], list(DTYPES))
    written, left_out = export_vectors(out, tmp_path / "vectors")
    assert (len(written), left_out) == (6, [])
    for file in written:
        path = tmp_path / "vectors" / file["file"]
        with Store(out) as store:
            described, _ = cell_of(store, file["cell"])
        mem = MemVectors.load(path)
        assert mem.header.model["dtype"] == described["dtype"]
    ls(out, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [row["dtype"] for row in shown] == [d for d in DTYPES for _ in range(3)]


@pytest.mark.parametrize("name", ["../t", "a/b", "", " ", ".", "..", "a\\\\b"])
def test_a_name_of_a_study_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(MemvecError, match="give it some letters, and no slash"):
        parse_spec(HEAD.replace('"small"', f'"{name}"') + RUN, "spec")


def test_priced_tokens_are_limited_by_budget_and_steps() -> None:
    text = f"{HEAD}{RUN}budget = 100\n{RUN}recipe = {{ steps = 10 }}\n"
    text = text.replace("[8]", "[16]", 1).replace("[8]", "[4]")
    limited, short = (max_tokens(planned) for planned in expand(parse_spec(text, "spec"))[:3:2])
    assert (limited, short) == (100.0 + 17, (4 + 1) * 10)  # the last step may exceed the budget


def test_a_forward_backward_token_costs_four_operations_a_parameter() -> None:
    """A device of four operations per parameter and second takes an hour for 3600 tokens."""
    facts = facts_of_name("pocket")
    assert hours(facts, 3600.0, 4.0 * facts.parameters) == pytest.approx(1)


def test_further_passages_that_a_protocol_crams_are_priced(tmp_path: Path) -> None:
    """A passage of 8 tokens in one vector costs 90 tokens in 10 steps, and so does each further
    passage that a protocol crams."""
    encoder = tmp_path / "e.safetensors"
    save_file({"x": torch.zeros(1)}, encoder, {"shape": '{"segment": 2, "lags": 3}'})
    costs = {
        'protocol = "exact"': 90,
        'protocol = "reading"': None,  # the protocol's own recipe; it crams each passage twice
        'protocol = "transfer"\norigin = "pocket"\npairs = 24': 90 * (1 + 3) + 24 * 2 * 90 / 12,
        'protocol = "sentences"\nlatents = "s.safetensors"\ncontext = 5': 90 * (1 + 5),
        f'protocol = "recurrent"\nencoder = "{encoder}"': 90 + 3 * (2 + 1) * 10,
        'protocol = "usable"': (8 + 1 + 1 + 6) * 10,  # a query of 6 after the vector
    }
    for block, cost in costs.items():
        recipe = "recipe = { steps = 10%s }\n" % (", query_tokens = 6" * ("usable" in block))
        text = f"{HEAD}[[runs]]\n{block}\nlengths = [8]\npassages = 12\n"
        planned = expand(parse_spec(text + recipe * (cost is not None), "spec"))[0]
        if cost is None:
            cost = 2 * 9 * planned.cell.recipe["steps"]
        assert max_tokens(planned) == cost, block


def test_a_model_is_loaded_again_as_the_study_loaded_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is in a folder now has no revision."""
    lm, loaded = tiny(), []
    monkeypatch.setattr(
        stored_model, "load_lm", lambda name, **how: loaded.append((name, how)) or lm
    )
    described = lm.description() | {"revision": "step1", "dtype": "bfloat16", "quantize": "8bit"}
    options = {"device": "cpu", "load": {"offload": True}}
    assert stored_model.model_of(described, "a/m", **options) is lm
    stored_model.model_of(described, "a/m", moved={"a/m": "folder", "b": "other"}, **options)
    how = {"device": "cpu", "dtype": "bfloat16", "quantize": "8bit", "offload": True}
    assert loaded == [("a/m", how | {"revision": "step1"}), ("folder", how | {"revision": None})]
    with pytest.raises(MemvecError, match="has other weights than the study's a/m"):
        stored_model.model_of(described | {"weights": "0" * 64}, "a/m")


def test_models_that_are_elsewhere_now_are_named(tmp_path: Path) -> None:
    """By the name in the spec or in reports; a study of one model needs none."""
    block = '[[runs]]\nprotocol = "exact"\nlengths = [3]\npassages = 1\nrecipe = { steps = 2 }\n'
    for folder, names in (("one", ["m/a"]), ("two", ["m/a", "m/b"])):
        models = "".join(f'[[models]]\nname = "{name}"\n' for name in names)
        text = HEAD.replace('[[models]]\nname = "tiny"\n', models) + block
        run(spec_in(tmp_path, text), tmp_path, tmp_path / folder)

    def moved(folder: str, *texts: str) -> dict[str, str]:
        return stored_model.moved_models(tmp_path / folder, texts)

    assert moved("one") == moved("two") == {}
    assert moved("one", "x=1/y") == {"m/a": "x=1/y"}
    assert moved("one", "m/a=x") == moved("one", "a=x") == moved("one", "x") == {"m/a": "x"}
    assert moved("two", "b=x=1", "m/a=y") == {"m/b": "x=1", "m/a": "y"}
    with pytest.raises(MemvecError, match="has 2 models: name the one that is at x, as 'a=x'"):
        moved("two", "x")
    with pytest.raises(MemvecError, match="no model 'c'"):
        moved("two", "c=x")


def test_a_study_without_rows_is_not_said_to_agree(tmp_path: Path) -> None:
    Store(tmp_path, write=True).close()
    with pytest.raises(MemvecError, match="has no rows yet: run it first"):
        check_study(tmp_path)
    with pytest.raises(MemvecError, match="has no rows yet: run it first"):
        stored_model.moved_models(tmp_path, ["x"])


@pytest.mark.slow
def test_a_study_of_two_models_is_checked_where_they_are_now(folder: Path, tmp_path: Path) -> None:
    """With the models of the study exchanged, their weights are others than the study's."""
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name)
    weights = load_file(tmp_path / "b/model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "b/model.safetensors", {"format": "pt"})
    models = "".join(f"[[models]]\nname = '{tmp_path / name}'\n" for name in ("a", "b"))
    text = HEAD.replace('[[models]]\nname = "tiny"\n', models) + (
        '[[runs]]\nprotocol = "exact"\nsources = ["random-tokens"]\nlengths = [3]\npassages = 1\n'
        "recipe = { steps = 2 }\n"
    )
    spec, out = spec_in(tmp_path, text), tmp_path / "out"
    run_study(spec, out, lambda model: LocalPool(load_lm(model.name)), base=tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f"{name}-now")
    places = {str(tmp_path / name): str(tmp_path / f"{name}-now") for name in ("a", "b")}
    assert check_study(out, moved=places)["wrong"] == []
    written, left_out = export_vectors(out, tmp_path / "files", moved=places)
    assert (len(written), left_out) == (2, [])
    exchanged = dict(zip(places, reversed(places.values()), strict=True))
    with pytest.raises(MemvecError, match="has other weights than the study's"):
        check_study(out, moved=exchanged)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "bfloat16"), ("quantize", "8bit"), ("revision", "step1")]
)
def test_a_model_that_was_loaded_otherwise_than_its_spec_says_is_refused(
    field: str, value: str
) -> None:
    """A spec without `quantize` says that no weights are; its dtype may be any."""
    loaded: dict[str, Any] = {"dtype": "float32", "quantize": None, "revision": None}
    plain, other = ModelSpec(name="m"), ModelSpec(name="m", **{field: value})
    said = f'the spec has {field} = "{value}" for m, .* has {loaded[field]}: pass {field} to'
    with pytest.raises(MemvecError, match=said):
        run_module._check_model(other, loaded)
    run_module._check_model(other, loaded | {field: value})
    run_module._check_model(plain, loaded)
    if field == "quantize":
        with pytest.raises(MemvecError, match=r"the spec has no quantize for m, .* has 8bit: "):
            run_module._check_model(plain, loaded | {field: value})


def test_duplicate_cells_and_impossible_lengths_are_named() -> None:
    with pytest.raises(MemvecError, match=r"repeats a cell.*in the spec twice"):
        expand(parse_spec(HEAD + RUN + RUN, "spec"))
    model = '"EleutherAI/pythia-160m"'
    text = HEAD.replace('"tiny"', model) + f'[[models]]\nname = {model}\nrevision = "step512"\n'
    spec = parse_spec(text + RUN.replace("[8]", "[4096]"), "spec")
    (sentence,) = (s for s in problems(spec, expand(spec), None) if "impossible" in s)
    assert re.match(r"impossible length: 4096 tokens.*2048", sentence)


def test_another_file_under_the_name_in_a_recipe_makes_another_cell(tmp_path: Path) -> None:
    (trigger := tmp_path / "trigger.safetensors").write_bytes(b"one")
    run = '[[runs]]\nprotocol = "usable"\nlengths = [8]\n'
    spec = parse_spec(f'{HEAD}{run}recipe = {{ trigger = "{trigger}" }}\n', "spec")
    first = expand(spec)[0].cell
    assert expand(spec)[0].cell.key == first.key
    trigger.write_bytes(b"another")
    second = expand(spec)[0].cell
    assert (second.recipe, second.key == first.key) == (first.recipe, False)
    assert list(second.settings()["files"]) == ["trigger"]
    plain = expand(parse_spec(HEAD + run, "spec"))[0].cell  # keys without files stay as they were
    assert "files" not in plain.settings()


def test_a_run_refuses_impossible_lengths_of_unknown_models(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, HEAD + RUN.replace("[8]", "[400]"))
    with pytest.raises(MemvecError, match="impossible length: 400 tokens"):
        run(spec, tmp_path, tmp_path / "s")


@pytest.mark.parametrize(
    ("recipe", "differs"),
    [
        ("", False),
        ("recipe = { start = 'noise' }", True),
        pytest.param("recipe = { coordinates = 'low-dim' }", True, marks=pytest.mark.slow),
        pytest.param("recipe = { preset = 'usable' }", True, marks=pytest.mark.slow),
    ],
)
def test_a_seed_that_changes_nothing_is_refused(recipe: str, differs: bool) -> None:
    """If all first vectors come from the encoder of `pocket`, restarts are copies of each other."""
    lm, source = load_lm("pocket"), RandomTokens()
    for seed in (0, 1):
        text = HEAD + RUN.replace("[8]", "[8]\nvectors = [2]") + f"seeds = [{seed}]\n{recipe}\n"
        cell = expand(parse_spec(text, "spec"))[0].cell
        if seed and not differs:
            with pytest.raises(MemvecError, match="seed 1 changes nothing: passages start from"):
                find_passages(lm, cell, source, 1, None)
        else:
            (found,) = find_passages(lm, cell, source, 1, None)
            first = [
                start_vectors(lm, [found.passage.ids], 2, replace(cell.to_recipe(), seed=s))[0]
                for s in (0, 1)
            ]
            drawn = recipe.endswith("'noise' }")
            assert torch.equal(*first) is not drawn


def test_a_passage_leaves_room_for_its_vectors_and_bos_in_the_context() -> None:
    lm, source = reader(), RandomTokens()
    assert lm.context == 128
    for more, longest in (("", 126), ('recipe = { start_rule = "bos" }', 125)):
        for length in (longest, longest + 1):
            text = HEAD + RUN.replace("[8]", f"[{length}]") + f"vectors = [2]\n{more}\n"
            cell = expand(parse_spec(text, "spec"))[0].cell
            if length == longest:
                (found,) = find_passages(lm, cell, source, 1, None)
                assert len(found.passage) == length
            else:
                with pytest.raises(MemvecError, match="and 2 vectors do not fit the context"):
                    find_passages(lm, cell, source, 1, None)


def test_a_missing_or_empty_text_is_refused_before_a_run(tmp_path: Path) -> None:
    spec = parse_spec(HEAD + RUN, "spec")
    assert "source missing" in problems(spec, expand(spec), tmp_path)[0]
    with pytest.raises(MemvecError, match="source missing"):
        run_study(spec, tmp_path / "s", maker, base=tmp_path)
    (tmp_path / "book.txt").touch()
    assert "source empty" in problems(spec, expand(spec), tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "column", "sentence"),
    [
        (
            b"text\nOne.\nTwo.\n",
            "text",
            "asked of source 'book', which has 2 texts",
        ),
        (b"text\nOne.\nTwo.\n", "txt", "has no column 'txt'"),
        (b"text\n\xff\n", "text", "is not a csv table"),
    ],
)
def test_texts_that_give_too_few_passages_are_refused_before_a_run(
    tmp_path: Path, content: bytes, column: str, sentence: str
) -> None:
    """A run of a night does not end at its last source, whose texts could have been counted."""
    (tmp_path / "book.csv").write_bytes(content)
    head = HEAD.replace("book.txt", "book.csv").replace("chunk_words = [40, 80]", "")
    text = head.replace('column = "text"', "") + f'column = "{column}"\n' + RUN
    spec = parse_spec(text + 'sources = ["book"]\npassages = 3\n', "spec")
    (found,) = problems(spec, expand(spec), tmp_path)
    assert sentence in found
    with pytest.raises(MemvecError, match=re.escape(sentence)):
        run_study(spec, tmp_path / "s", maker, base=tmp_path)
    assert not (tmp_path / "s").exists()
    unused = parse_spec(text + 'sources = ["random-tokens"]\n', "spec")
    assert problems(unused, expand(unused), tmp_path) == []


def test_a_model_beside_the_spec_is_not_taken_for_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of texts are relative to the spec, those of models to the working directory."""
    (tmp_path / "book.txt").write_text("A text.")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(Olmo2Config().to_json_string())
    spec = parse_spec(HEAD + RUN, "spec")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    (sentence,) = problems(spec, expand(spec), tmp_path)
    assert "tiny is a folder beside the spec" in sentence
    monkeypatch.chdir(tmp_path)
    assert not problems(spec, expand(spec), tmp_path)


def test_missing_models_and_files_of_protocols_are_refused_before_a_run(
    tmp_path: Path,
) -> None:
    """The absolute path of a model is no name on the Hub, so its folder must exist."""
    head = HEAD.replace("book.txt", "s.txt")
    (tmp_path / "s.txt").write_text("A text.")
    gone = str(tmp_path / "gone")
    spec = parse_spec(head.replace('"tiny"', f'"{gone}"') + RUN, "spec")
    assert problems(spec, expand(spec), tmp_path) == [
        f"no model in {gone}: there is no config.json."
    ]
    for protocol, option, what in (
        ("recurrent", "encoder", "encoder"),
        ("sentences", "latents", "latent model"),
    ):
        block = RUN.replace("exact", protocol) + f'{option} = "{gone}.safetensors"\n'
        spec = parse_spec(head + block, "spec")
        (sentence,) = problems(spec, expand(spec), tmp_path)
        assert f"there is no {what} {gone}.safetensors: make one with memvec" in sentence
        with pytest.raises(MemvecError, match=f"there is no {what}"):
            run_study(spec, tmp_path / "s", maker, base=tmp_path)


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_ready_specs_are_valid_and_priced_without_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"(\.runs/[^"]+)"', path.read_text("utf-8")):  # made by other commands
        if name.endswith(".safetensors"):
            (file := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        else:
            Olmo2Config(hidden_size=128).save_pretrained(tmp_path / name.replace("*", "a"))
    spec = read_spec(path)
    planned = expand(spec, path.parent)
    # The only problem may be that nltk or its data are not installed, so every length fits.
    assert all("nltk" in s for s in problems(spec, planned, path.parent))
    for p in price(planned):
        assert p.gpu_hours is not None
        assert p.gpu_hours > 0


def test_files_that_are_no_spec_and_no_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bin.dat").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(MemvecError, match=r"bin.dat is not UTF-8 text: a spec is a TOML file"):
        read_spec(tmp_path / "bin.dat")
    spec = parse_spec(HEAD.replace('"tiny"', f'"{tmp_path}"') + RUN, "spec")
    for config in (b'{"hidden_size": ', b"[]", b"\xff", b'{"hidden_size": "wide"}'):
        (tmp_path / "config.json").write_bytes(config)
        with pytest.raises(MemvecError, match=r"config.json is not a model's config"):
            price(expand(spec))


def test_one_model_may_replace_all_others() -> None:
    text = HEAD.replace("[[sources]]", '[[models]]\nname = "other"\n[[sources]]', 1)
    text += RUN + 'models = ["tiny"]\n' + RUN + 'models = ["other"]\n'
    cells = expand(parse_spec(text, "spec", "mine"))
    assert {p.cell.model for p in cells} == {"mine"}
    assert len(cells) == 2  # one for each source, because the two runs have become equal


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def done(every_protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with every protocol."""
    return shutil.copytree(every_protocol, tmp_path_factory.mktemp("study") / "done")


# Protocols whose studies have files of their own: test_book, test_onestep_studies, test_frontier,
# test_checkpoints, test_transfer, test_spaces, test_reading, test_sentences,
# test_recurrent.
ELSEWHERE = {"book", "one-step-arrangements", "one-step-groups", "usable"}
ELSEWHERE |= {"checkpoints", "transfer", "spaces", "reading", "sentences", "recurrent"}


@pytest.mark.slow
def test_every_planned_row_is_stored_with_every_column(done: Path) -> None:
    with Store(done / "out") as store:
        rows, planned = store.counts()
        assert rows == planned == sum(p.passages for p in expand(spec_in(done), done))
        found = {r[0] for r in store.db.execute("SELECT DISTINCT protocol FROM cells")}
        assert found | ELSEWHERE == {*protocol_names()}
        assert not found & ELSEWHERE
        # A growing schedule has no loss of the whole passage in each step, so no least loss.
        whole = "cell IN (SELECT cell FROM cells WHERE protocol = 'paper')"
        for name in COLUMNS:
            of = whole if name == "least_loss_gain" else "TRUE"
            missing = store.db.execute(f"SELECT count(*) FROM rows WHERE {of} AND {name} IS NULL")
            assert missing.fetchone()[0] == 0, name
        extras = [json.loads(r[0]) for r in store.db.execute("SELECT extra FROM rows")]
        contexts = [e["after_context"] for e in extras if "after_context" in e]
        assert [set(c) for c in contexts] == [{"4", "8"}] * 2  # 4000 tokens do not fit
        assert store.db.execute("SELECT count(*) FROM paths").fetchone()[0] == 6  # all pairs
        record = json.loads(store.db.execute("SELECT record FROM environments").fetchone()[0])
        assert {"torch", "transformers", "memvec", "model"} <= set(record)


def test_running_again_adds_and_changes_nothing(done: Path) -> None:
    before = everything(done / "out")
    status = run(spec_in(done), done, done / "out")
    assert status.rows_now == 0
    assert everything(done / "out") == before


def test_a_run_with_more_passages_keeps_the_rows_of_an_earlier_run(tmp_path: Path) -> None:
    text = HEAD + RUN.replace("[8]", "[4]") + "recipe = { steps = 6 }\npassages = 2\n"
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out")
    before = everything(tmp_path / "out")
    files = sorted((tmp_path / "out" / "vectors").glob("*.bin"))
    for file in files:  # a process may be killed after it wrote numbers and before their row
        file.write_bytes(file.read_bytes() + b"torn")
    more = text.replace("passages = 2", "passages = 5")
    status = run(spec_in(tmp_path, more), tmp_path, tmp_path / "out")
    after = everything(tmp_path / "out")
    assert status.rows_now == 6
    assert {key: after[key] for key in before} == before
    with Store(tmp_path / "out") as store:
        sizes = dict(store.db.execute("SELECT cell, sum(size) FROM rows GROUP BY cell").fetchall())
    assert {file.stem: file.stat().st_size for file in files} == sizes


def test_rows_of_an_earlier_spec_stay_and_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    for steps in (1, 2):
        text = f"{HEAD}{RUN}sources = ['random-tokens']\npassages = 2\nrecipe.steps = {steps}\n"
        run(spec_in(tmp_path, text), tmp_path, tmp_path / "out")
    with Store(tmp_path / "out") as store:
        assert store.counts() == (2, 2)
    assert check_study(tmp_path / "out")["rows"] == 2
    assert export_rows(tmp_path / "out", tmp_path / "rows.csv") == 4
    frame = pd.read_csv(tmp_path / "rows.csv")
    assert frame["planned"].tolist() == [step == 2 for step in frame["step_limit"]]


def test_recomputing_every_column_agrees(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    found = check_study(done / "out")
    assert found["wrong"] == []
    assert found["rows"] == len(everything(done / "out"))
    assert {"copy", "context", "needed_bits"} <= set(found["worst"])


def test_lines_between_restarts_are_of_the_passages_that_both_have(tmp_path: Path) -> None:
    one = '[[runs]]\nprotocol = "geometry"\nsources = ["random-tokens"]\nlengths = [4]\n'
    one += "recipe = { lr = 0.1, steps = 2 }\n"
    for seeds in ((0, 1), (1, 0)):  # the first restart has more passages, then the second one
        text = HEAD + "".join(
            f"{one}passages = {n}\nseeds = [{seed}]\n"
            for n, seed in zip((3, 2), seeds, strict=True)
        )
        folder = tmp_path / str(seeds[0])
        run(spec_in(tmp_path, text), tmp_path, folder)
        with Store(folder) as store:
            numbers = store.db.execute("SELECT number FROM paths ORDER BY number").fetchall()
        assert numbers == [(0,), (1,)]


# How the check treats each column: see the docstring of memvec.lab.study.check.
RECOMPUTED = frozenset(
    (
        *("passage", "tokens", "predicted", "exact", "horizon", "accuracy", "margin", "lm_bits"),
        *("mem_bits", "information_gain", "token_gain", "lm_right", "horizon_gain"),
        *("horizon_token_gain", "start_rule", "extra"),
    )
)
BOUNDED = frozenset(["status", "margin_asked", "steps", "spent"])
RECORDED = frozenset(["cell", "number", "seconds", "batch_size", "worker", "least_loss_gain"])


def test_every_column_is_checked_in_one_of_three_ways() -> None:
    kinds = (RECOMPUTED, BOUNDED, RECORDED)
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))
    assert frozenset().union(*kinds) == set(COLUMNS)


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two rows and the line between them; tests falsify copies of it."""
    base = tmp_path_factory.mktemp("two")
    text = HEAD + RUN.replace("exact", "geometry").replace("[8]", "[5]")
    text += 'sources = ["random-tokens"]\npassages = 1\nseeds = [0, 1]\n'
    run(spec_in(base, text + "recipe = { lr = 0.1, steps = 12 }\n"), base, base / "out")
    return base / "out"


@pytest.mark.parametrize(
    "extra", ["{bad", "[1]", "null", '{"context": {"x": [1, 1]}}', '{"needed_bits": []}']
)
def test_the_check_notices_an_extra_that_is_no_measurement(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    shutil.copytree(two_rows, tmp_path / "out")
    db = sqlite3.connect(tmp_path / "out" / "study.sqlite")
    db.execute("UPDATE rows SET extra = ?", (extra,))
    db.commit()
    db.close()
    assert any(f"extra is stored as {extra}" in s for s in check_study(tmp_path / "out")["wrong"])


def test_the_check_refuses_a_token_that_the_model_does_not_have(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hash of the passage was made to fit."""
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    shutil.copytree(two_rows, tmp_path / "out")
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / "study.sqlite")) as db:
        ids = np.asarray([5, reader().vocab_size, 6, 7, 8], dtype="<i4")
        key = ids_hash(ids.tolist())
        db.execute("UPDATE passages SET ids = ?, passage = ?", (ids.tobytes(), key))
        db.execute("UPDATE rows SET passage = ?", (key,))
        db.commit()
    wrong = check_study(tmp_path / "out")["wrong"]
    assert any("a token of the passage is not one of" in sentence for sentence in wrong), wrong


def test_vectors_of_a_row_that_was_changed_are_not_written(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    shutil.copytree(two_rows, tmp_path / "out")
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / "study.sqlite")) as db:
        db.execute("UPDATE rows SET horizon = 9999")
        db.commit()
    with pytest.raises(MemvecError, match="was changed after it was written: 'memvec study check'"):
        export_vectors(tmp_path / "out", tmp_path / "files")


@pytest.mark.slow
def test_only_one_model_is_in_memory(tmp_path: Path) -> None:
    """The model before is gone when the next one is loaded, to run a study and to check it."""
    models = "".join(f'[[models]]\nname = "{name}"\n' for name in ("a", "b", "c"))
    block = '[[runs]]\nprotocol = "exact"\nlengths = [3]\npassages = 1\nrecipe = { steps = 2 }\n'
    text = HEAD.replace('[[models]]\nname = "tiny"\n', models) + block
    loaded: list[weakref.ref[FrozenLM]] = []

    def load(*_: Any, **__: Any) -> FrozenLM:
        gc.collect()
        assert not any(earlier() for earlier in loaded)
        loaded.append(weakref.ref(lm := copy.copy(reader())))
        return lm

    run_study(spec_in(tmp_path, text), tmp_path / "out", lambda _: LocalPool(load()), base=tmp_path)
    assert len(loaded) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memvec.lab.study.stored_model.load_lm", load)
        assert check_study(tmp_path / "out")["wrong"] == []
        export_vectors(tmp_path / "out", tmp_path / "files")
    assert len(loaded) == 9


@pytest.mark.parametrize("error", [IndexError, ZeroDivisionError])
def test_the_check_goes_on_after_an_extra_that_nothing_can_be_computed_with(
    two_rows: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(*_: object) -> list[object]:
        raise error("of it")

    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    monkeypatch.setattr("memvec.lab.protocols.geometry.Geometry.recompute", failing)
    wrong = check_study(two_rows)["wrong"]
    assert len(wrong) == 2
    assert all(f"its recompute fails ({error.__name__}: of it)" in s for s in wrong)


def test_the_check_shows_the_beginning_of_a_long_extra(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    shutil.copytree(two_rows, tmp_path / "out")
    db = sqlite3.connect(tmp_path / "out" / "study.sqlite")
    db.execute("UPDATE rows SET extra = ?", ("[" * 100_000,))
    db.commit()
    db.close()
    said = [s for s in check_study(tmp_path / "out")["wrong"] if "extra is stored as [[[" in s]
    assert said
    assert all(len(s) < 500 for s in said)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_check_notices_a_falsified_column(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    shutil.copytree(two_rows, tmp_path / "out")
    kind = Row.model_fields[column].annotation
    changed = {
        int: f"{column} + 3",
        float: f"coalesce({column}, 0) + 3",
        bool: f"1 - {column}",
        dict[str, Any]: """'{"needed_bits": 1.0, "copy": null}'""",
    }.get(kind, f"{column} || 'x'")
    db = sqlite3.connect(tmp_path / "out" / "study.sqlite")
    db.execute(f"UPDATE rows SET {column} = {changed}")
    db.commit()
    db.close()
    wrong = check_study(tmp_path / "out")["wrong"]
    named = {"passage": "has no passage", "cell": "name a cell"}
    named |= {"predicted": "does not hold the vectors"}  # the vectors are read by this number
    if column in RECORDED and column != "cell":
        assert any("changed after it was written" in s for s in wrong)
    else:
        assert any(named.get(column, f": {column} is stored as") in s for s in wrong), wrong


@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
@pytest.mark.parametrize("own", [False, True])
def test_the_check_measures_a_text_without_vectors_as_certification_does(
    rule: str, own: bool
) -> None:
    """If the text begins with BOS, no other BOS is in front, and this one costs no bits."""
    lm = reader()
    ids = (lm.bos_id if own else 9, 7, 8, 5)
    scores = position_scores(lm, torch.zeros(1, 1, lm.width), [Passage(ids)], rule)
    bits, margin = check_alone(lm, ids, rule)
    np.testing.assert_allclose(scores.lm_bits[0].numpy(), bits, atol=1e-4)
    np.testing.assert_allclose(scores.lm_margin[0].numpy(), margin, atol=1e-4)
    assert (bits[0] == 0) == (own and rule != "first-token")


@pytest.mark.parametrize("schedule", ["growing", "geometric", "whole"])
@pytest.mark.parametrize("narrow_after", [0, 2])
def test_the_check_allows_the_tokens_that_a_schedule_spends(
    schedule: str, narrow_after: int
) -> None:
    """The bounds hold for every schedule, also for one whose targets double from a few tokens."""
    recipe = Recipe(schedule=schedule, narrow_after=narrow_after, look_ahead=2, steps=12)
    text = HEAD + '[[runs]]\nprotocol = "exact"\nlengths = [20]\n'
    planned, *_ = expand(parse_spec(text, "spec"))
    cell = replace(planned.cell, recipe=recipe.record())
    for outcome in Engine(tiny(), recipe).run(passages(20, 9)):
        n = len(outcome.passage)
        low, high = _spent(cell, outcome.steps, n, before=0, between=0, front=0)
        assert low <= outcome.spent <= high


def test_a_tie_after_the_first_error_does_not_allow_another_horizon() -> None:
    """In bfloat16 many margins are ties. A horizon may end between the first tie and the first
    token that is wrong by more than a tie."""
    margins = np.array([2.0, 0.1, 3.0, -4.0, 0.2, -0.1])
    nothing: dict[str, Any] = {"steps": (0, 0), "spent": (0, 0), "margins": (), "ties": 3}
    nothing |= {"lm_ties": 3, "passage": object.__new__(SlowPassage)}

    def slow(margins: Any) -> Slow:
        columns = {"predicted": 6, "horizon": 3}
        return Slow(columns=columns, positions=np.stack([margins] * 4), **nothing)

    assert check_module._horizons(slow(margins), "bfloat16") == (1, 3)
    assert check_module._horizons(slow(margins + 0.3 * (margins > 0)), "bfloat16") == (3, 3)
    assert check_module._allowed(slow(margins), "bfloat16")["exact"] == 0
    assert check_module._allowed(slow(np.abs(margins)), "bfloat16")["exact"] == 1


@pytest.mark.parametrize("horizon", range(-1, 8))
def test_the_check_accepts_the_horizons_that_ties_allow_and_no_others(
    horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symmetric tolerance would accept 4 and 5, after a token that is wrong without a tie."""
    margins = np.array([2.0, 0.1, 3.0, -4.0, 0.2, -0.1])
    columns = {"predicted": 6, "horizon": 3, "passage": "a", "start_rule": "bos"}
    options: dict[str, Any] = {"steps": (0, 0), "spent": (0, 0), "margins": (), "ties": 3}
    options |= {"lm_ties": 3, "passage": object.__new__(SlowPassage)}
    slow = Slow(columns=columns, positions=np.stack([margins] * 4), **options)
    monkeypatch.setattr(check_module, "_costs", lambda *_: [])
    allowed = check_module._allowed(slow, "bfloat16")
    monkeypatch.setattr(check_module, "_allowed", lambda *_: {"horizon": allowed["horizon"]})
    row = columns | {"horizon": horizon, "exact": int(horizon == 6)}
    wrong = check_module._compare(row, slow, "bfloat16", {})
    assert (wrong == []) == (1 <= horizon <= 3)


@pytest.mark.parametrize(
    ("stored", "again", "allowed", "right"),
    [
        ([1.0], [1.0], [0.0], True),
        ([1.0], [1.5], [0.5], True),
        ([1.0], [], [], False),
        ([], [1.0], [0.0], False),
        ([1.0, 2.0], [1.0], [0.0, 0.0], False),
        ([1.0, 2.0], [1.0, 2.0], [0.0], False),
        ([1.0, math.nan], [1.0, 2.0], [9.0, 9.0], False),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_a_protocol_measured_agrees_if_each_value_does(
    monkeypatch: pytest.MonkeyPatch,
    stored: list[float],
    again: list[float],
    allowed: list[float],
    right: bool,
) -> None:
    """No value may be missing, or have no limit."""
    compared = [Compared("copy", stored, again, allowed)]
    monkeypatch.setattr(type(protocol_of("copy")), "recompute", lambda *_: compared)
    extra, slow = '{"after_copy": [1.0, 2]}', SimpleNamespace(passage=None)
    assert (check_module._extra("copy", extra, slow, {}) == []) == right


def test_the_check_notices_falsified_tensors_texts_lines_and_cells(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    assert check_study(two_rows)["wrong"] == []
    assert check_study(two_rows)["worst"]["paths"] < 1e-6
    falsified = {
        "UPDATE paths SET accuracy = replace(accuracy, substr(accuracy, 2, 3), '7.0')": "between",
        "UPDATE paths SET accuracy = '[1.0, [2]]'": "between them is no list of numbers",
        "UPDATE paths SET accuracy = '{'": "between them is no list of numbers",
        "UPDATE paths SET accuracy = '[]'": "between them is no list of numbers",
        "UPDATE paths SET accuracy = '[1.0]'": "1 numbers are stored of",
        "UPDATE passages SET ids = substr(ids, 1, 8)": "passage is stored as",
        "UPDATE cells SET random_text = 0": "random_text is stored as 0 and its settings say 1",
        "UPDATE cells SET settings = json_set(settings, '$.recipe', json('{}'))": "those of cell",
        "UPDATE passages SET text = CAST('another' AS BLOB)": "text is not that of its tokens",
        "UPDATE cells SET length = 77": "length is stored as 77",
        "UPDATE cells SET settings = replace(settings, ': 5', ': 6')": "settings are those of",
        "UPDATE rows SET least_loss_gain = information_gain - 3": "least_loss_gain is stored as",
        "UPDATE rows SET status = 'done' WHERE margin < margin_asked - 1": "stored as done and",
    }
    for i, (change, sentence) in enumerate(falsified.items()):
        shutil.copytree(two_rows, tmp_path / str(i))
        db = sqlite3.connect(tmp_path / str(i) / "study.sqlite")
        assert db.execute(change).rowcount >= 1
        db.commit()
        db.close()
        assert any(sentence in s for s in check_study(tmp_path / str(i))["wrong"]), sentence
    # Lines of cells that the last spec does not have are not compared, as their model may be gone.
    with contextlib.closing(sqlite3.connect(tmp_path / "0" / "study.sqlite")) as db:
        db.execute("UPDATE cells SET planned = 0 WHERE protocol = 'geometry'")
        db.commit()
    with pytest.raises(MemvecError, match="has no rows yet"):
        check_study(tmp_path / "0")
    kinds = ("bits without vectors", "bits with", "margin with", "margin without")
    places = {f"positions ({name}) differ": 4 * 4 * (i - 4) for i, name in enumerate(kinds)}
    for sentence, at in {"does not hold the vectors": 0, **places}.items():
        shutil.copytree(two_rows, tmp_path / f"at {at}")
        file = next((tmp_path / f"at {at}" / "vectors").glob("*.bin"))
        data = bytearray(file.read_bytes())
        data[at : at + 4] = b"\x00\x00\x00\x41"  # 8.0; each kind has four positions
        file.write_bytes(data)
        assert any(sentence in s for s in check_study(tmp_path / f"at {at}")["wrong"]), sentence


def test_a_study_is_checked_and_its_vectors_are_written_with_the_options_of_loading(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "memvec.lab.study.stored_model.load_lm",
        lambda *_, **options: asked.append(options) or reader(),
    )
    check(two_rows, load=["checkpointing"])
    vectors(two_rows, tmp_path / "files", load=["checkpointing"])
    assert len(asked) == 2
    assert all(o["checkpointing"] is True and o["quantize"] is None for o in asked)
    for command, where in ((check, {}), (vectors, {"out": tmp_path / "more"})):
        with pytest.raises(MemvecError, match="belong to its spec"):
            command(two_rows, load=["quantize=8bit"], **where)


class DiesAfter(LocalPool):
    """A pool that stops after its fourth row."""

    def cram(self, units: Any, on_progress: Any) -> Any:
        for i, finished in enumerate(super().cram(units, on_progress)):
            if i == 4:
                raise KeyboardInterrupt
            yield finished


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "seeds"), [("paper", "[0]"), ("geometry", "[0, 1]")])
def test_a_run_with_fewer_passages_after_a_kill_is_complete(
    tmp_path: Path, protocol: str, seeds: str
) -> None:
    """Rows are stored in the order in which passages finish, not in the order of their numbers."""
    run_ = f'[[runs]]\nprotocol = "{protocol}"\nsources = ["random-tokens"]\nseeds = {seeds}\n'
    run_ += "lengths = [4]\nrecipe = { lr = 0.1, steps = 100 }\n"
    head = HEAD.replace("batch_size = 3", "batch_size = 8")
    many, few = (spec_in(tmp_path, f"{head}{run_}passages = {n}\n") for n in (8, 4))
    with pytest.raises(KeyboardInterrupt):
        run_study(many, tmp_path / "out", lambda model: DiesAfter(maker(model).lm), base=tmp_path)
    with Store(tmp_path / "out") as store:
        (cell, *_) = [c for (c,) in store.db.execute("SELECT DISTINCT cell FROM rows")]
        assert set(store.done(cell)) != {0, 1, 2, 3}
    status = run_study(few, tmp_path / "out", maker, base=tmp_path)
    assert status.rows == status.planned
    with Store(tmp_path / "out") as store:
        assert store.counts() == (status.planned, status.planned)
        assert set(store.done(cell)) >= {0, 1, 2, 3}


@pytest.mark.slow
def test_the_same_tokens_after_other_text_are_another_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refrain is in the book after different lines; the check reads each row after its own."""
    lines = "The fox is brown. la la la la. A cat sat on a mat. la la la la. Dogs see cats. "
    text = HEAD.replace('kind = "random-tokens"', 'kind = "book"\npath = "book.txt"')
    text += '[[runs]]\nprotocol = "context"\nsources = ["refrain"]\nlengths = [3]\npassages = 20\n'
    text += "contexts = [2, 3]\nrecipe = { lr = 0.1, steps = 4 }\n"
    text = text.replace('kind = "book"', 'name = "refrain"\nkind = "book"')
    spec = parse_spec(text.replace("book.txt", "refrain.txt", 1), "spec")
    (tmp_path / "book.txt").write_text(SENTENCES * 30, "utf-8")
    (tmp_path / "refrain.txt").write_text(lines + "la la la la. " * 3, "utf-8")
    run(spec, tmp_path, tmp_path / "out")
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    assert check_study(tmp_path / "out")["wrong"] == []
    with Store(tmp_path / "out") as store:
        rows = store.db.execute("SELECT cell, number FROM rows").fetchall()
        kept = [store.passage(*row) for row in rows]
    assert len({k.ids for k in kept}) < len({(k.ids, k.before) for k in kept})


def test_a_full_disk_loses_no_stored_row(two_rows: Path, tmp_path: Path) -> None:
    shutil.copytree(two_rows, tmp_path / "out")
    with Store(tmp_path / "out", write=True) as store:
        store.db.execute("PRAGMA max_page_count=1")
        with pytest.raises(MemvecError, match=r"cannot be written: .*full; what is in it is kept"):
            store.put_passages(
                "c",
                [(str(i), SourcedPassage(i, Passage((i,) * 999), "x"), None) for i in range(99)],
            )
    assert everything(tmp_path / "out") == everything(two_rows)


def test_a_report_of_an_unfinished_study_says_so(
    two_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(two_rows, tmp_path / "out")
    report(folder, figures=False)
    assert "Only" not in capsys.readouterr().err
    with Store(folder, write=True) as store:
        store.db.execute("UPDATE cells SET planned = planned + 3")
        done, planned = store.counts()
    report(folder, figures=False)
    assert f"Only {done} of {planned} passages are crammed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_full_disk_leaves_an_earlier_export_as_it_was(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = tmp_path / f"rows.{kind}"
    export_rows(two_rows, file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemvecError, match=r"cannot be written: No space left on device\.$"):
        export_rows(two_rows, file)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_named_with_the_report_that_is_not_written(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("memvec.lab.report.report.draw_all", full)
    with pytest.raises(MemvecError, match=r"report in .*rep cannot be written: No space left"):
        write_report(two_rows, tmp_path / "rep")


def test_a_folder_without_write_permission_is_read(
    two_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite keeps two files beside the database, which a reader of such a folder cannot make."""
    shutil.copytree(two_rows, tmp_path / "out")
    for file in (tmp_path / "out").glob("*-*"):
        file.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert everything(tmp_path / "out") == everything(two_rows)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


@pytest.mark.parametrize("what", ["encoder", "usable_encoder", "trigger"])
def test_a_cell_refuses_rows_of_another_encoder_or_trigger(
    two_rows: Path, tmp_path: Path, what: str
) -> None:
    shutil.copytree(two_rows, tmp_path / "out")
    with Store(tmp_path / "out", write=True) as store:
        cell, text = store.db.execute("SELECT cell, description FROM cells").fetchone()
        before = json.loads(text)
        store.describe(cell, before)
        with pytest.raises(MemvecError, match=f"has {what} other here, and the rows in"):
            store.describe(cell, {**before, what: "other"})


@pytest.mark.parametrize(
    "more", [("passages = 1", "passages = 2"), ("[8]", "[8, 12]"), ("[8]", "[5]")]
)
def test_a_changed_text_of_a_study_is_refused(tmp_path: Path, more: tuple[str, str]) -> None:
    text = HEAD + RUN + 'sources = ["book"]\npassages = 1\nrecipe = { steps = 2 }\n'
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out")
    spec = spec_in(tmp_path, text.replace(*more))
    if "passages" not in more[0]:  # with the old text the run continues
        shutil.copytree(tmp_path / "out", tmp_path / "same")
        assert run(spec, tmp_path, tmp_path / "same").rows_now == 1
    book = tmp_path / "book.txt"
    book.write_text("A new book begins here. It is not the old one at all. " * 40, "utf-8")
    with pytest.raises(MemvecError, match="gives another passage 0"):
        run(spec, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"attention": "flash"},
        {"quantize": "4bit"},
        {"weights": "w"},
        {"config": "c"},
        {"probe": [9.0] * 8},  # other layers with the same embeddings
    ],
)
def test_a_cell_refuses_rows_of_a_model_that_computes_differently(
    done: Path, tmp_path: Path, other: dict[str, str]
) -> None:
    shutil.copytree(done / "out", tmp_path / "out")
    with Store(tmp_path / "out", write=True) as store:
        (cell,) = store.db.execute("SELECT cell FROM cells").fetchone()
        store.describe(cell, reader().description())
        ((name, value),) = other.items()
        fingerprint = name in ("weights", "config", "probe")
        sentence = "has other weights than" if fingerprint else f"has {name} {value} here"
        with pytest.raises(MemvecError, match=sentence) as found:
            store.describe(cell, {**reader().description(), **other})
        assert "another folder." in str(found.value)


def test_a_second_process_on_the_same_study_is_refused(done: Path) -> None:
    with (
        Store(done / "out", write=True),
        pytest.raises(MemvecError, match="another memvec is running"),
    ):
        Store(done / "out", write=True)
    Store(done / "out", write=True).close()


def test_stores_of_other_versions_or_programs_are_refused(tmp_path: Path) -> None:
    Store(tmp_path, write=True).close()
    db = sqlite3.connect(tmp_path / "study.sqlite")
    db.execute("UPDATE meta SET value = '999' WHERE key = 'schema'")
    db.commit()
    with pytest.raises(MemvecError, match="of version 999"):
        Store(tmp_path)
    db.executescript("DROP TABLE meta; CREATE TABLE songs (name TEXT)")
    db.close()
    with pytest.raises(MemvecError, match="another program's database"):
        Store(tmp_path)
    (tmp_path / "study.sqlite").write_text("no database")
    with pytest.raises(MemvecError, match="not a study's store"):
        Store(tmp_path)
    with pytest.raises(MemvecError, match="there is no study"):
        Store(tmp_path / "nowhere")


def test_a_store_opens_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a#b?c%20.study"
    Store(folder, write=True).close()
    with Store(folder) as store:
        assert store.counts() == (0, 0)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.db.execute("DELETE FROM meta")
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_file_without_a_store_does_not_hide_the_other_studies(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "out", tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "study.sqlite").touch()
    with pytest.raises(MemvecError, match=r"study.sqlite is empty"):
        Store(tmp_path / "empty")
    ls(tmp_path, json=True)
    said = capsys.readouterr()
    assert [study["name"] for study in json.loads(said.out)] == ["small"]
    assert "study.sqlite is empty" in " ".join(said.err.split())
    assert (tmp_path / "empty" / "study.sqlite").stat().st_size == 0
    Store(tmp_path / "empty", write=True).close()  # a run continues after a kill at its start


def test_the_cells_of_a_quantized_model_are_told_from_those_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the cells of an earlier spec, which have other weights than the last one's."""
    texts = [HEAD, HEAD.replace('"tiny"', '"tiny"\nquantize = "8bit"')]
    shown = []
    for text in texts:
        with Store(tmp_path / "s", write=True) as store:
            store.plan(expand(parse_spec(text + RUN, "s")), set(), {"name": "small"})
        ls(tmp_path / "s", json=True)
        shown.append(json.loads(capsys.readouterr().out))
    assert all("quantize" not in cell for cell in shown[0])
    n = len(shown[0])
    assert [(c["quantize"], c["planned"] > 0) for c in shown[1]] == (
        [("8bit", True)] * n + [(None, False)] * n
    )
    ls(tmp_path / "s")
    table = capsys.readouterr().out
    assert table.count("8bit") == n
    assert "None" not in table


def test_brackets_in_texts_of_the_user_are_printed_and_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "[mem] closing [/b]"
    text = HEAD.replace('"small"', f'"small"\nabout = "{words}"')
    text = text.replace('"book"', f'"{words}"').replace("book.txt", "gone [/b].txt")
    (tmp_path / "s.toml").write_text(text + RUN)
    monkeypatch.setattr("memvec.cli.display.out", Console(width=300))
    with pytest.raises(typer.Exit):  # a text of the spec is missing
        validate(tmp_path / "s.toml")
    said = capsys.readouterr().out
    assert f"small: {words}" in said
    assert "gone [/b].txt" in said
    with Store(tmp_path / "s", write=True) as store:
        store.plan(expand(parse_spec(text + RUN, "s")), set(), {"name": words})
    for folder in (tmp_path, tmp_path / "s"):
        ls(folder)
        assert words in capsys.readouterr().out
    wrong = {"rows": 0, "worst": {}, "wrong": [words], "unchecked": []}
    monkeypatch.setattr("memvec.lab.study.check.check_study", lambda *_, **__: wrong)
    with pytest.raises(typer.Exit):
        check(tmp_path / "s")
    assert words in capsys.readouterr().out
    terminal = Console(width=300, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr("memvec.cli.progress.err", terminal)
    with study_progress(words) as show:
        show(StudyStatus(0, 1, 0, 1, 0, 0.0, None, words, None))
    assert words in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_export_has_every_row_and_column(done: Path, tmp_path: Path) -> None:
    import pandas as pd

    for name in ("rows.csv", "rows.parquet"):
        n = export_rows(done / "out", tmp_path / name)
        frame = pd.read_csv(tmp_path / name) if "csv" in name else pd.read_parquet(tmp_path / name)
        assert len(frame) == n == len(everything(done / "out"))
        sentences = json.loads((tmp_path / f"{name}.columns.json").read_text())
        assert set(frame) == set(sentences)
    with Store(done / "out") as store:
        cells = [
            json.loads(settings)
            for (settings,) in store.db.execute(
                "SELECT settings FROM rows JOIN cells USING (cell) "
                "ORDER BY cells.planned = 0, cells.position, rows.number"
            )
        ]
    for name in ("recipe", "options"):
        assert [json.loads(value) for value in frame[name]] == [cell[name] for cell in cells]
    assert list(frame["dtype"]) == [cell["dtype"] for cell in cells]


def test_vectors_of_a_study_are_files_that_decode_as_its_rows_say(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = reader()
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: lm)
    vectors(done / "out", tmp_path / "files")
    output = "".join(capsys.readouterr())
    rows = everything(done / "out")
    paths = list((tmp_path / "files").iterdir())
    files = {path.name.split(".")[0]: MemVectors.load(path) for path in paths}
    assert {cell for cell, _ in rows} == set(files)
    assert f"has {len(files)} files" in output
    assert "left out" not in output
    with Store(done / "out") as store:
        for (cell, number), row in rows.items():
            mem = files[cell]
            record = mem.passages[number]
            _, exact, horizon = row[1:4]
            assert (record.sha256, record.exact, record.horizon) == (row[0], exact, horizon)
            assert torch.equal(mem.vectors[number], store.tensors(cell, number)[0])
            kept = store.passage(cell, number)
            if mem.exact:
                assert mem.tokens(lm)[number] == list(kept.ids)
                assert mem.documents(lm)[number] == kept.text
    assert any(mem.exact for mem in files.values())
    with pytest.raises(MemvecError, match="files exists and is not empty"):
        vectors(done / "out", tmp_path / "files")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('dtype = "bfloat16"', "dtype"),
        ('revision = "main"', "revision"),
        ('quantize = "8bit"', "quantize"),
    ],
)
def test_a_model_that_was_not_loaded_as_the_spec_says_is_refused(
    line: str, name: str, tmp_path: Path
) -> None:
    """Otherwise its rows would be in the cell of another model."""
    text = HEAD.replace('name = "tiny"', f'name = "tiny"\n{line}') + RUN
    assert line in text
    spec = spec_in(tmp_path, text.replace("novels", "random-tokens"))
    with pytest.raises(MemvecError, match=f"pass {name} to load_lm"):
        run_study(spec, tmp_path / "out", maker, base=tmp_path)
    assert not everything(tmp_path / "out")


def test_an_export_has_the_suffix_of_its_option_and_replaces_only_exports(
    done: Path, tmp_path: Path
) -> None:
    whole, wrong = tmp_path / "rows.parquet", tmp_path / "x.parquet"
    with pytest.raises(MemvecError, match=r"--csv .*x.parquet: its name must end in .csv"):
        export(done / "out", whole, wrong)
    with pytest.raises(MemvecError, match=r"--parquet .*x.csv: its name must end in .parquet"):
        export(done / "out", tmp_path / "x.csv")
    with pytest.raises(MemvecError, match=r"there is no folder .*gone to write x.csv in"):
        export(done / "out", whole, tmp_path / "gone" / "x.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(MemvecError, match=r"mine.csv exists and is no export of rows"):
        export(done / "out", whole, tmp_path / "mine.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]
    for _ in range(2):  # an earlier export may be replaced
        export(done / "out", whole)
        assert whole.is_file()


def test_a_check_of_a_negative_number_of_rows_is_refused(done: Path) -> None:
    with pytest.raises(MemvecError, match=r"^sample must be at least 0, not -1\.$"):
        check(done / "out", sample=-1)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemvecError, match=r"there is no folder .*nowhere"):
        ls(tmp_path / "nowhere")


# ---------------------------------------------------------------------- killed runs

KILLED = (
    HEAD.replace('"tiny"', '"MODEL"')
    + """
[[runs]]
protocol = "exact"
lengths = [6]
passages = 6
recipe = { steps = 40 }
[[runs]]
protocol = "paper"
lengths = [4, 7]
passages = 4
recipe = { lr = 0.1, steps = 40 }
"""
)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def arguments(base: Path, out: str, *more: str) -> list[str]:
    return [str(word) for word in ("study", "run", base / "s.toml", "-o", base / out, *more)]


def command(python: str, base: Path, out: str) -> list[str]:
    return [python, "-m", "memvec.cli", *arguments(base, out)]


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory, python: str) -> Path:
    """A folder with a spec for a model on disk, and its uninterrupted study in 'whole'.

    It has one slot: after a kill, passages get other slots, where products may round otherwise.
    """
    base = tmp_path_factory.mktemp("killed")
    text = KILLED.replace("MODEL", str(folder)).replace("batch_size = 3", "batch_size = 1")
    spec_in(base, text)
    (base / "s.toml").write_text(text)
    subprocess.run(command(python, base, "whole"), check=True, env=ENV, capture_output=True)
    return base


def test_a_folder_of_another_study_is_refused(tmp_path):
    text = (
        HEAD
        + """
[[runs]]
protocol = "exact"
lengths = [3]
passages = 1
recipe = { steps = 3 }
"""
    )
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out", text)
    renamed = text.replace('name = "', 'name = "other-', 1)
    with pytest.raises(MemvecError, match=r"holds the study .*: name another folder"):
        run(spec_in(tmp_path, renamed), tmp_path, tmp_path / "out", renamed)


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_and_is_completed(killed: Path, python: str) -> None:
    whole, words = everything(killed / "whole"), command(python, killed, "cut")
    file = killed / "cut" / "study.sqlite"
    for least in (1, 5):  # minimum number of rows before the kill
        process = subprocess.Popen(
            words, env=ENV, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            if file.exists() and count(file) >= least:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)  # tests/preloaded.py turns it into a SIGKILL
        process.wait()
        kept = everything(killed / "cut")
        assert all(whole[key] == row for key, row in kept.items())
    # A kill between the tensors and their row leaves bytes, which the next run cuts off.
    some = next((killed / "cut" / "vectors").glob("*.bin"))
    with some.open("ab") as stream:
        stream.write(b"half a vector")
    ran = subprocess.run([*words, "--json"], env=ENV, capture_output=True, check=True)
    status = json.loads(ran.stdout.splitlines()[-1])
    assert status["rows_now"] == len(whole) - len(kept)
    assert everything(killed / "cut") == whole


def count(file: Path) -> int:
    try:
        db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        try:
            return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])
        finally:
            db.close()
    except sqlite3.Error:
        return 0


@pytest.mark.slow
def test_two_ray_workers_of_which_one_is_killed_give_the_same_rows(
    killed: Path, memvec_with_ray: list[str]
) -> None:
    pytest.importorskip("ray")
    whole = everything(killed / "whole")
    file, struck = killed / "ray" / "study.sqlite", 0
    with (killed / "ray.log").open("w") as log:
        words = [*memvec_with_ray, *arguments(killed, "ray", "--workers", "2")]
        process = subprocess.Popen(words, env=ENV, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 590  # Ray is slow on a busy machine
            while time.monotonic() < end and process.poll() is None:
                if not struck and count(file) >= 1:
                    driver = int((killed / "ray.log").read_text().split()[0])
                    if workers := cramming(driver):
                        struck = workers[0]
                        os.kill(struck, signal.SIGKILL)
                time.sleep(0.05)
        finally:
            process.kill()
    said = (killed / "ray.log").read_text()
    assert process.wait(30) == 0, said
    assert struck, "no worker was caught at work"
    assert "a worker died" in said
    same = everything(killed / "ray")
    assert same.keys() == whole.keys()
    for key, row in whole.items():
        assert same[key][:8] == row[:8]  # decisions, costs and vectors; only bits may round
        assert same[key][8:] == pytest.approx(row[8:], abs=1e-3)


def cramming(driver: int) -> list[int]:
    """The ids of Ray actors of the process `driver` that are cramming.

    They write to files in a folder that Ray names after the process.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::Worker.stream"):
                files = [str(file.readlink()) for file in (entry / "fd").iterdir()]
                if any(f"_{driver}/" in file for file in files):
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ['trigger = "bos"', 'trigger = "</s>"'])
def test_a_line_between_restarts_ends_at_the_accuracies_of_their_rows(
    trigger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = reader()
    text = HEAD + '[[runs]]\nprotocol = "geometry"\nsources = ["random-tokens"]\nlengths = [4]\n'
    text += "passages = 2\nseeds = [0, 1]\n"
    text += f'recipe = {{ steps = 60, start_rule = "bos", {trigger} }}\n'
    with torch.inference_mode():  # a caller may be in inference mode, for example in a notebook
        run_study(spec_in(tmp_path, text), tmp_path / "out", lambda _: LocalPool(lm), base=tmp_path)
    with Store(tmp_path / "out") as store:
        found = store.db.execute(
            "SELECT paths.accuracy, a.accuracy, b.accuracy FROM paths "
            "JOIN rows a ON a.cell = first AND a.number = paths.number "
            "JOIN rows b ON b.cell = second AND b.number = paths.number"
        ).fetchall()
    assert len(found) == 2
    for path, one, other in found:
        assert (json.loads(path)[0], json.loads(path)[-1]) == (one, other)
        assert one > 0
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: lm)
    assert check_study(tmp_path / "out")["wrong"] == []
