"""Protocols of other packages, and stores of earlier versions of memvec."""

from __future__ import annotations

import importlib
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from conftest import QUICK, passages, reader, tiny
from memvec import registry
from memvec.cli.study_results import check
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Finished, Outcome, outcomes_of
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_names, protocol_of
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report.report import write_report
from memvec.lab.slow import SlowPassage, bits_and_margins, logits
from memvec.lab.sources import SourcedPassage
from memvec.lab.study import schema
from memvec.lab.study.check import check_study
from memvec.lab.study.export import export_rows
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.storage import STORAGES
from studies import EVERYTHING, HEAD, USABLE, everything, run, spec_in

MINE = '''
"""A protocol of another package: one extra column, one table, one figure."""

import json

from pydantic import Field

from memvec import register
from memvec.lab.protocols import protocol
from memvec.lab.report.data import by_series, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table


@register("protocol", "hardest")
class Hardest(protocol.Protocol):
    extras = {"hardest_bits": "bits of the hardest token without vectors, times the scale"}

    class Options(protocol.Options):
        scale: float = Field(default=1.0, description="factor of the bits")

    def extra(self, lm, sourced, outcome, start_rule, options):
        return {"hardest_bits": options["scale"] * float(outcome.scores.lm_bits.max())}

    def recompute(self, passage, stored):
        again = passage.options["scale"] * float(passage.lm_bits.max())
        value = float(stored["hardest_bits"])
        return [protocol.Compared("hardest_bits", [value], [again], [1e-3])]

    def tables(self, data, *, compare):
        rows = []
        for (model, source, K), group in by_series(data.of(self.name)):
            bits = [json.loads(extra)["hardest_bits"] for extra in group["extra"]]
            rows.append([short(model), source, K, max(bits)])
        return [Table("hardest", "Hardest token", "", ["model", "source", "K", "bits"], rows)]

    def figures(self, data, *, compare):
        panels = []
        for (_, source, _), group in by_series(data.of(self.name)):
            x, y = group["lm_bits"].tolist(), group["mem_bits"].tolist()
            panels.append(Panel(source, "H, bits", "bits left", [Series(source, x, y)]))
        return [Plot("hardest", "Hardest token", "One point per passage.", panels)]
'''
HARDEST = """
[[runs]]
protocol = "hardest"
sources = ["random-tokens"]
lengths = [4]
passages = 2
scale = 2.0
recipe = { lr = 0.1, steps = 2 }
"""


def test_a_protocol_without_a_recomputation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())

    @registry.register("protocol", "hits")
    class Hits(Protocol):
        extras: ClassVar = {"hits": "arg-max hits with the vectors"}

        def extra(self, lm, sourced, outcome, start_rule, options):
            return {"hits": int((outcome.scores.margin > 0).sum())}

    spec = spec_in(tmp_path, SMALL.replace('"exact"', '"hits"'))
    run(spec, tmp_path, tmp_path / "out")
    check(tmp_path / "out")
    shown = capsys.readouterr().out
    assert "protocol 'hits' has no recompute: the values of hits were not computed again." in shown
    assert "columns agree" in shown
    for given, why in ((list, "compares nothing"), (lambda: [1.0], "other values"), (int, "int")):
        monkeypatch.setattr(Hits, "recompute", lambda *_, given=given: given())
        wrong = check_study(tmp_path / "out")["wrong"]
        assert wrong
        assert all("its recompute fails" in sentence and why in sentence for sentence in wrong)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of another package is imported, and its protocol removed after the test."""
    (tmp_path / "hardest_token.py").write_text(MINE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("hardest_token")
    yield
    del sys.modules["hardest_token"]
    registry._ADDED["protocol"].pop("hardest")


@pytest.mark.slow
def test_a_protocol_of_another_package_runs_is_checked_and_reported(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    assert protocol_names()[-1] == "hardest"
    run(spec_in(tmp_path, HEAD + HARDEST), tmp_path, tmp_path / "out")
    with Store(tmp_path / "out") as store:
        extras = [json.loads(e) for (e,) in store.db.execute("SELECT extra FROM rows")]
    assert [set(extra) for extra in extras] == [{"hardest_bits"}] * 2
    checked = check_study(tmp_path / "out")
    assert checked["wrong"] == []
    assert checked["worst"]["hardest_bits"] < 1e-3
    page = write_report(tmp_path / "out", tmp_path / "report").page
    table = (tmp_path / "report/tables/hardest.csv").read_text().splitlines()
    highest = max(extra["hardest_bits"] for extra in extras)
    assert float(table[1].split(",")[-1]) == pytest.approx(highest)
    assert (tmp_path / "report/figures/hardest.svg").is_file()
    assert "Hardest token" in page.read_text("utf-8")
    export_rows(tmp_path / "out", tmp_path / "rows.csv")
    sentences = json.loads((tmp_path / "rows.csv.columns.json").read_text())
    assert "'hardest_bits' of protocol 'hardest': bits of the hardest token" in sentences["extra"]
    falsify(tmp_path / "out", '{"hardest_bits": 99.0}')
    assert any(
        "hardest_bits is stored as [99.0]" in s for s in check_study(tmp_path / "out")["wrong"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"), [("tables", "Table"), ("figures", "Plot"), ("cards", "Card")]
)
def test_a_protocol_that_reports_no_list_is_named_in_the_reports_of_its_rows_only(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    monkeypatch.setattr(registry.get("protocol", "hardest"), method, lambda *_, **__: None)
    for protocol in ("hardest", "exact"):
        spec = HEAD + HARDEST.replace("hardest", protocol).replace("scale = 2.0", "")
        run(spec_in(tmp_path, spec), tmp_path, tmp_path / protocol)
    with pytest.raises(MemvecError, match=f"'hardest' has to return a list of {kind} from"):
        write_report(tmp_path / "hardest", tmp_path / "report")
    assert write_report(tmp_path / "exact", tmp_path / "report").page.is_file()


def test_errors_of_a_spec_name_protocols_and_options_of_other_packages(plugin: None) -> None:
    with pytest.raises(MemvecError, match=r"protocol 'hardst' in runs .1.: did you mean 'hardest'"):
        parse_spec(HEAD + HARDEST.replace("hardest", "hardst"), "spec")
    with pytest.raises(MemvecError, match=r"has no option 'scale': it belongs to 'hardest'"):
        parse_spec(HEAD + HARDEST.replace("hardest", "exact"), "spec")
    with pytest.raises(
        MemvecError, match=r"run 1 \(hardest\): option scale must be a number, not 'wide'"
    ):
        parse_spec(HEAD + HARDEST.replace("2.0", '"wide"'), "spec")


def test_a_measurement_without_its_sentence_is_refused(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.get("protocol", "hardest"), "extras", {})
    for measured in ({"hardest_bits": 1.0}, None):
        hardest = registry.get("protocol", "hardest")
        monkeypatch.setattr(hardest, "extra_of_cell", lambda *_, measured=measured: measured)
        with pytest.raises(MemvecError, match="`extras` must have a sentence for each"):
            run(spec_in(tmp_path, HEAD + HARDEST), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("value", [torch.ones(2), {1, 2}])
def test_a_measurement_that_is_no_json_is_refused(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    hardest = registry.get("protocol", "hardest")
    monkeypatch.setattr(hardest, "extra", lambda *_: {"hardest_bits": value})
    with pytest.raises(MemvecError, match="protocol 'hardest' measured what JSON cannot hold"):
        run(spec_in(tmp_path, HEAD + HARDEST), tmp_path, tmp_path / "out")


def test_every_protocol_of_the_project_can_be_loaded() -> None:
    for name in registry.BUILT_IN["protocol"]:
        assert protocol_of(name).name == name
        assert all(protocol_of(name).extras.values())


EXTRAS = EVERYTHING[EVERYTHING.index('[[runs]]\nprotocol = "context"') :]
EXTRAS = EXTRAS[: EXTRAS.index('[[runs]]\nprotocol = "one-step"')] + USABLE


@pytest.fixture(scope="module")
def extras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of the protocols that have measurements of their own."""
    base = tmp_path_factory.mktemp("extras")
    run(spec_in(base, HEAD + EXTRAS), base, base / "out")
    return base / "out"


FALSIFIED: list[dict[str, tuple[str, str]]] = [  # protocol -> its false `extra`, the sentence
    {
        "context": ('{"after_context": {}}', "context, numbers of tokens is stored as []"),
        "copy": ('{"after_copy": [1.0, 0]}', "copy is stored as [1.0"),
        "upper-bound": (
            '{"needed_bits": 99.5, "least_moved_bits": 1}',
            "needed_bits is stored as [99.5]",
        ),
        "usable": ('{"words": [[1]]}', "extra is stored as"),
    },
    {
        "context": (
            '{"after_context": {"4": [1, 0], "8": [1, 0]}}',
            "context 4 is stored as [1.0",
        ),
        "copy": ('{"after_copy": null}', "copy is stored as [nan"),
        "upper-bound": (
            '{"needed_bits": 1, "least_moved_bits": 99.5}',
            "least_moved_bits is stored as [99.5]",
        ),
    },
    {
        "context": ('{"after_context": {"4": [1], "8": [1]}}', "extra is stored as"),
        "upper-bound": ('{"copy": null}', "extra is stored as"),
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("falsified", FALSIFIED)
def test_the_check_notices_a_falsified_measurement_of_each_protocol(
    extras: Path, monkeypatch: pytest.MonkeyPatch, falsified: dict[str, tuple[str, str]]
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    before = {name: falsify(extras, value, name) for name, (value, _) in falsified.items()}
    wrong = check_study(extras)["wrong"]
    for rows in before.values():
        restore(extras, rows)
    for name, (_, sentence) in falsified.items():
        named = [s for s in wrong if sentence in s and f"({name}, " in s]
        assert len(named) == len(before[name]), (name, wrong)


def falsify(folder: Path, extra: str, protocol: str = "") -> list[tuple[str, int, str]]:
    """Write another `extra` into all rows of a protocol (default: all); returns what was there."""
    db = sqlite3.connect(folder / "study.sqlite")
    kept = db.execute(
        "SELECT cell, number, extra FROM rows JOIN cells USING (cell) WHERE protocol LIKE ?",
        (protocol or "%",),
    ).fetchall()
    db.close()
    restore(folder, [(cell, number, extra) for cell, number, _ in kept])
    return kept


def restore(folder: Path, rows: list[tuple[str, int, str]]) -> None:
    db = sqlite3.connect(folder / "study.sqlite")
    for cell, number, extra in rows:
        db.execute("UPDATE rows SET extra=? WHERE cell=? AND number=?", (extra, cell, number))
    db.commit()
    db.close()


@pytest.mark.parametrize("tokens", [4, 64, 65])
def test_the_context_is_the_last_tokens_before_a_passage_if_they_fit(tokens: int) -> None:
    """Two copies of 65 tokens do not fit 128 positions, nor do 64 tokens in front of 65."""
    lm, (before, passage) = tiny(), passages(70, tokens, seed=42)
    sourced = SourcedPassage(0, passage, "x", before.ids)
    (outcome,) = Engine(lm, Recipe(steps=1)).run(passages(1))
    copied = protocol_of("copy").extra(lm, sourced, outcome, "vectors", {})["after_copy"]
    options = {"contexts": (2, 64)}
    contexts = protocol_of("context").extra(lm, sourced, outcome, "vectors", options)
    assert (copied is None) == (2 * tokens > lm.context)
    assert list(contexts["after_context"]) == ["2", "64"][: 1 + (64 + tokens <= lm.context)]
    table = logits(lm, None, [*before.ids[-2:], *passage.ids])[1:-1]
    bits, margin = bits_and_margins(table, passage.ids)
    expected = [pytest.approx(bits.sum(), abs=1e-2), int((margin > 0).sum())]
    assert contexts["after_context"]["2"] == expected


# ---------------------------------------------------------------------- stores of earlier versions

SMALL = HEAD + HARDEST.replace("hardest", "exact").replace("scale = 2.0\n", "")
# The columns of `rows` before they derived from PassageResult, in their order.
EARLIER = (
    "cell number passage tokens predicted status exact horizon accuracy margin margin_asked "
    "lm_bits mem_bits information_gain token_gain lm_right horizon_gain horizon_token_gain steps "
    "spent seconds start_rule seats worker extra offset size digest environment finished seal"
)


def as_earlier(folder: Path) -> None:
    """Give a store the order of columns of an earlier version, and its column `seats`."""
    db = sqlite3.connect(folder / "study.sqlite")
    names = [{"seats": "batch_size"}.get(name, name) for name in EARLIER.split()]
    records = [
        dict(zip(names, row, strict=True))
        for row in db.execute(f"SELECT {','.join(names)} FROM rows")
    ]
    types = {name: kind for _, name, kind, *_ in db.execute("PRAGMA table_info(rows)")}
    columns = [f"{old} {types[new]}" for old, new in zip(EARLIER.split(), names, strict=True)]
    db.execute("DROP TABLE rows")
    db.execute(
        f"CREATE TABLE rows ({', '.join(columns)}, PRIMARY KEY (cell, number)) WITHOUT ROWID"
    )
    for record in records:
        record["seal"] = schema.seal({k: v for k, v in record.items() if k != "seal"})
        db.execute(f"INSERT INTO rows VALUES ({','.join('?' * len(record))})", [*record.values()])
    db.commit()
    db.close()


@pytest.mark.slow
def test_a_store_of_an_earlier_version_is_read_checked_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    folder = tmp_path / "out"
    run(spec_in(tmp_path, SMALL), tmp_path, folder)
    before = everything(folder)
    as_earlier(folder)
    for again in range(2):  # unchanged, and after a run has renamed its column
        kept = everything(folder)
        assert {key: kept[key] for key in before} == before
        assert check_study(folder)["wrong"] == []
        assert "batch_size" in export_columns(folder, tmp_path)
        write_report(folder, tmp_path / "report", figures=False)
        more = SMALL.replace("passages = 2", f"passages = {3 + again}")
        assert run(spec_in(tmp_path, more), tmp_path, folder).rows_now == 1
    assert check_study(folder)["wrong"] == []


def export_columns(folder: Path, base: Path) -> str:
    export_rows(folder, base / "rows.csv")
    return (base / "rows.csv").read_text().splitlines()[0]


def test_a_store_without_a_column_is_refused_in_one_sentence(tmp_path: Path) -> None:
    Store(tmp_path, write=True).close()
    db = sqlite3.connect(tmp_path / "study.sqlite")
    db.execute("ALTER TABLE rows DROP COLUMN lm_right")
    db.close()
    for write in (False, True):
        with pytest.raises(MemvecError, match=r"no column 'lm_right'.*run it with the memvec that"):
            Store(tmp_path, write=write)


def test_a_spec_with_the_earlier_name_of_the_batch_size_is_read(tmp_path: Path) -> None:
    text = SMALL.replace("batch_size = 3", "seats = 3")
    with pytest.warns(FutureWarning, match="'seats' is called 'batch_size' now"):
        assert parse_spec(text, "spec").batch_size == 3


def test_the_protocol_of_the_documentation_measures_and_is_recomputed(monkeypatch):
    """The protocol is the example of docs/howto/add-protocol.md."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})
    page = Path(__file__).parent.parent / "docs" / "howto" / "add-protocol.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, str(page), "exec"), {})
    protocol, lm = protocol_of("hardest-token"), tiny()
    for outcome in Engine(lm, QUICK, vectors=2, batch_size=2).run(passages(3, 4, seed=41)):
        extra = protocol.extra(lm, None, outcome, "vectors", {})
        assert list(extra) == list(protocol.extras)
        ids = outcome.passage.ids
        table = logits(lm, None, [lm.bos_id, *ids])[-len(ids) - 1 : -1]
        lm_bits, lm_margin = bits_and_margins(table, ids)
        slow = SlowPassage(
            lm,
            ids=ids,
            before=(),
            given=0,
            lm_bits=lm_bits,
            lm_margin=lm_margin,
            bits_tolerance=1e-3,
            options={},
            vectors=outcome.vectors,
        )
        (compared,) = protocol.recompute(slow, extra)
        assert compared.stored == pytest.approx(compared.recomputed, abs=compared.allowed[0])


@pytest.mark.parametrize("name", ["upper-bound", "context", "copy"])
@pytest.mark.parametrize("start_rule", ["vectors", "first-token"])
def test_a_passages_own_bos_does_not_change_its_bits_without_vectors(name, start_rule):
    """H_LM does not count that BOS, so no protocol may count it or read it twice."""
    lm, protocol = reader(), protocol_of(name)
    before, options = (7, 8, 9, 10), {"contexts": [3]}
    storage, rest = STORAGES["float32"], (5, 9, 6, 11)
    measured = []
    for ids, rule in ((rest, "vectors"), ((lm.bos_id, *rest), start_rule)):
        crammed = Finished(
            Passage(ids), torch.ones(1, lm.width), "budget", 0.1, steps=0, spent=0, seconds=0.0
        )
        (outcome,) = outcomes_of(lm, [crammed], rule, storage)
        sourced = SourcedPassage(0, crammed.passage, "of a test", before)
        extra = protocol.extra(lm, sourced, outcome, rule, options)
        again = _slowly(lm, outcome, rule, before=before, options=options)
        for compared in protocol.recompute(again, extra):
            assert compared.stored[0] == pytest.approx(compared.recomputed[0], abs=1e-3)
        measured.append((outcome.metrics.lm_bits, extra))
    (bits, extra), (own_bits, own_extra) = measured
    assert own_bits == pytest.approx(bits, abs=1e-4)
    if name == "upper-bound":
        assert own_extra == pytest.approx(extra, abs=1e-4)
    elif start_rule == "vectors":
        ((least, hits),) = _pairs(extra)
        assert _pairs(own_extra) == [[pytest.approx(least, abs=1e-4), hits + 1]]


def _slowly(lm: FrozenLM, outcome: Outcome, rule: str, **more: Any) -> SlowPassage:
    """The passage that `study check` gives to a protocol, made from an outcome."""
    return SlowPassage(
        lm,
        ids=outcome.passage.ids,
        given=int(rule == "first-token"),
        lm_bits=outcome.scores.lm_bits.double().numpy(),
        lm_margin=outcome.scores.lm_margin.double().numpy(),
        bits_tolerance=1e-3,
        vectors=outcome.vectors,
        **more,
    )


def _pairs(extra: dict[str, Any]) -> list[list[float]]:
    """[bits, arg-max hits] of the protocols 'context' and 'copy'."""
    value = next(iter(extra.values()))
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("ids", [(5,), (5, 7)])
def test_the_upper_bound_of_a_model_without_bos_leaves_the_first_token_out(ids, monkeypatch):
    lm = tiny("llama")
    monkeypatch.setattr(lm, "bos_id", None)
    passage, protocol = Passage(ids), protocol_of("upper-bound")
    (outcome,) = Engine(lm, QUICK, vectors=2).run([passage])
    extra = protocol.extra(lm, SourcedPassage(0, passage, "of a test"), outcome, "vectors", {})
    for compared in protocol.recompute(
        _slowly(lm, outcome, "vectors", before=(), options={}), extra
    ):
        assert compared.stored == pytest.approx(compared.recomputed, abs=1e-3)
    assert extra["least_moved_bits"] <= extra["needed_bits"] + 1e-4
    assert (extra["needed_bits"] == 0) == (extra["least_moved_bits"] == 0) == (len(ids) == 1)
