"""Files from untrusted sources: wrong contents are refused in one sentence, and never executed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from conftest import QUICK, passages, reader
from memvec import MemVectors, codec, hub, load_lm
from memvec.companions.encoder_files import shape_of
from memvec.companions.triggers import load_trigger
from memvec.encoders.checkpoint import load_checkpoint
from memvec.engines.folder import config_of
from memvec.errors import MemvecError
from memvec.export.folder import write_folder
from memvec.journal import Journal
from memvec.lab.report.report import FILES, delete_others, write_report
from memvec.lab.report.table import Table
from memvec.lab.sources.text_readers import read_texts
from memvec.lab.study.export import export_rows
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.passages.passage import ids_hash

DEEP = "[" * 20_000
CLAIM = 'x"); import os #`|<b>\n\x1b[2J]'


@pytest.fixture(scope="module")
def mem() -> MemVectors:
    """A text in a tiny model."""
    return codec.cram(reader(), ["the fox"], vectors=2, tokens=2, recipe=QUICK)


def forged(mem: MemVectors, path: Path, **passage: object) -> Path:
    """A file with a correct digest whose first passage has other figures."""
    record = mem.passages[0].model_copy(update=passage)
    header = mem.header.model_copy(update={"passages": [record, *mem.passages[1:]]})
    return MemVectors(mem.vectors, header, mem.soft).save(path)


# ---------------------------------------------------------------------- vectors


def test_loaded_vectors_do_not_change_with_their_file(mem, tmp_path):
    """`cp` writes into the existing file, so memory-mapped numbers would change or be gone."""
    file = mem.save(tmp_path / "a.mem")
    loaded, data = MemVectors.load(file), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert loaded.digest == mem.digest
    os.truncate(file, 0)  # a mapped file ends the process here
    assert loaded.digest == mem.digest


@pytest.mark.parametrize(
    "claim", [{"predicted": 10**400}, {"token_gain": -(10**400)}, {"horizon": 3}, {"predicted": 1}]
)
def test_a_horizon_or_gain_longer_than_its_passage_is_refused(mem, tmp_path, claim):
    with pytest.raises(MemvecError, match="its horizon or gain is longer than the passage"):
        MemVectors.load(forged(mem, tmp_path / "a.mem", **claim))


def test_an_error_with_a_name_from_a_file_is_one_printable_line(mem):
    model = {**mem.header.model, "name": CLAIM, "weights": "0" * 64}
    other = MemVectors(mem.vectors, mem.header.model_copy(update={"model": model}))
    with pytest.raises(MemvecError, match="other weights") as caught:
        other.check_model(reader())
    assert str(caught.value).isprintable()
    assert r"\n\x1b[2J" in str(caught.value)


def test_a_card_escapes_names_from_a_file(mem):
    model = {**mem.header.model, "name": CLAIM, "dtype": CLAIM, "revision": CLAIM}
    update = {"model": model, "certificate": {"device": CLAIM, "exact": True}}
    card = hub.card(MemVectors(mem.vectors, mem.header.model_copy(update=update)))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 5
    assert "import os" in code.split('load_lm("')[1].split('"')[0]
    assert "<b>" not in card
    assert all(line.count("|") == 3 for line in card.splitlines() if line.startswith("|"))


# ---------------------------------------------------------------------- models and their files


def test_code_in_a_models_folder_is_not_run(folder, tmp_path, monkeypatch):
    model, ran = shutil.copytree(folder, tmp_path / "model"), tmp_path / "ran"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(MemvecError, match="has code of its own, which memvec does not run"):
        load_lm(model)
    assert not ran.exists()


def test_json_that_is_nested_too_deep_is_refused(folder, tmp_path):
    from safetensors.torch import save_file

    model = shutil.copytree(folder, tmp_path / "model")
    (model / "memvec.json").write_text(DEEP)
    file = tmp_path / "a.safetensors"
    save_file({"trigger": torch.ones(1, 64)}, file, {"model": DEEP, "about": "{}", "shape": DEEP})
    (tmp_path / "a.jsonl").write_text(DEEP)
    for read in (
        lambda: load_lm(model),
        lambda: load_trigger(file, reader()),
        lambda: shape_of(file),
        lambda: read_texts(str(tmp_path / "a.jsonl")),
    ):
        with pytest.raises(MemvecError, match="nested too deep"):
            read()


@pytest.mark.parametrize("config", [DEEP, "[]1", "[1]", '{"text_config": "x"}'])
def test_a_config_that_is_no_object_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(MemvecError, match="is no folder of a model"):
        config_of(tmp_path)


# ---------------------------------------------------------------------- what a run resumes from


class Never(torch.nn.Linear):
    """A network for checkpoints, none of which is loaded."""

    def __init__(self) -> None:
        super().__init__(2, 2)


@pytest.mark.parametrize("state", [b"", b"no zip", {}, {"identity": {}}, {"identity": 3}])
def test_a_checkpoint_with_other_contents_is_refused_as_damaged(tmp_path, state):
    if isinstance(state, dict):
        torch.save(state, buffer := io.BytesIO())
        state = buffer.getvalue()
    (tmp_path / "a").write_bytes(hashlib.sha256(state).digest() + state)
    network = Never()
    optimizer = torch.optim.SGD(network.parameters())
    with pytest.raises(MemvecError, match="is damaged: delete it to start over"):
        load_checkpoint(tmp_path / "a", {"model": {}}, network, optimizer)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"shape": [9, 9], "dtype": "nn"}'])
def test_a_row_of_a_journal_with_other_contents_is_refused_as_damaged(tmp_path, record):
    journal, passage = Journal(tmp_path / "j", {}), passages(3)[0]
    codec.cram(reader(), ["the"], recipe=QUICK, journal=journal)
    digest = hashlib.sha256(record.encode() + b"1234").hexdigest()
    journal._db.execute(
        "UPDATE finished_passages SET ids = ?, vectors = ?, record = ?, digest = ?",
        (ids_hash(passage.ids), b"1234", record, digest),
    )
    with pytest.raises(MemvecError, match="is damaged"):
        journal.get(passage)
    journal.close()


# ---------------------------------------------------------------------- studies

SPEC = 'name = "a"\n{}\n[[models]]\nname = "pocket"\n[[sources]]\nkind = "random-words"\n'


@pytest.mark.parametrize("more", ["x = " + "9" * 5000, "x = " + DEEP])
def test_a_spec_that_pythons_parser_cannot_read_is_refused(more):
    with pytest.raises(MemvecError, match="is not TOML"):
        parse_spec(SPEC.format(more), "s.toml")


COLUMNS = {
    "cells": ("protocol", "model", "length", "vectors", "storage", "settings", "description"),
    "rows": ("tokens", "predicted", "steps", "exact", "offset", "size", "extra"),
    "passages": ("name", "ids", "text"),
    "environments": ("record",),
}


def opened(folder: Path) -> None:
    """Open a study and read its rows."""
    with Store(folder) as store:
        for cell, number in store.db.execute("SELECT cell, number FROM rows").fetchall():
            store.tensors(cell, number)
            store.passage(cell, number)
    export_rows(folder, folder / "rows.csv")


@pytest.fixture(scope="module")
def study(every_protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of every protocol."""
    folder = shutil.copytree(every_protocol, tmp_path_factory.mktemp("study") / "out")
    opened(folder / "out")
    return folder / "out"


def falsified(study: Path, copy: Path, sql: str, value: object) -> Path:
    """A copy of the study with a change."""
    shutil.copytree(study, copy)
    with contextlib.closing(sqlite3.connect(copy / "study.sqlite")) as db, db:
        db.execute(sql, (value,))
    return copy


@pytest.mark.parametrize(
    ("table", "column"), [(t, c) for t, names in COLUMNS.items() for c in names]
)
def test_a_value_of_another_type_is_refused(study, tmp_path, table, column):
    text = table == "rows" and column != "extra"  # into columns of numbers
    kind = "x" if text or column in ("ids", "text") else b"\0\xff"
    copy = falsified(study, tmp_path / "copy", f"UPDATE {table} SET {column} = ?", kind)
    with pytest.raises(
        MemvecError, match=rf"is damaged: the column {column} of {table} has values"
    ):
        opened(copy)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        *(("cells", "vectors", n) for n in (0, -1, 2**62)),
        *(("cells", "length", n) for n in (0, -1)),
        *(("cells", "storage", name) for name in ("", "nn", "int8")),
        *(("cells", "settings", text) for text in ("", "{", "[]", "{}", "3", DEEP)),
        *(("cells", "description", text) for text in ("", "null", "{}", '{"width": "x"}', DEEP)),
        *(("rows", "size", n) for n in (-1, 0, 2**62)),
        *(("rows", "offset", n) for n in (-1, 2**62)),
        *(("rows", "predicted", n) for n in (-1, 0, 2**40)),
        *(("environments", "record", text) for text in ("", "3", "[]", DEEP)),
        *(("passages", "ids", data) for data in (b"", b"123")),
        *(("passages", "pieces", text) for text in ("", "3", "[3]", DEEP)),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_value_out_of_range_or_of_another_form_is_refused(study, tmp_path, table, column, value):
    copy = falsified(study, tmp_path / "copy", f"UPDATE {table} SET {column} = ?", value)
    with pytest.raises(MemvecError, match=r"damaged|does not hold|cannot be read"):
        opened(copy)


@pytest.mark.parametrize(
    "extra",
    ["{", "null", DEEP, '{"after_context": null}', '{"after_context": {"4": []}}'],
    ids=lambda value: repr(value)[:12],
)
def test_a_report_refuses_extra_measurements_that_no_study_writes(study, tmp_path, extra):
    only = "UPDATE cells SET planned = 0 WHERE protocol != ?"
    first = falsified(study, tmp_path / "first", only, "context")
    write_report(first, tmp_path / "report", figures=False)
    copy = falsified(first, tmp_path / "copy", "UPDATE rows SET extra = ?", extra)
    with pytest.raises(MemvecError, match=r"has values that no report can be made of.* names rows"):
        write_report(copy, tmp_path / "report", figures=False)


def test_a_symbolic_link_among_the_vectors_is_not_written_through(tmp_path):
    """A run truncates a file of vectors to its rows; through a link it would truncate another."""
    (other := tmp_path / "other").write_text("kept")
    with Store(tmp_path / "study", write=True) as store:
        (store.vectors / "cell.bin").symlink_to(other)
        with pytest.raises(OSError, match="symbolic link"):
            store._stream("cell")
    assert other.read_text() == "kept"


@pytest.mark.parametrize("record", ["", DEEP, "3", "[3]", '["tables/../../kept"]', "{"])
def test_a_wrong_record_of_files_deletes_nothing(tmp_path, record):
    out = tmp_path / "report"
    (out / "tables").mkdir(parents=True)
    (kept := tmp_path / "kept.csv").write_text("kept")
    (out / FILES).write_text(record)
    delete_others(out, [])
    assert kept.read_text() == "kept"


def test_a_table_in_markdown_escapes_tags_and_cell_borders():
    table = Table.of("a", "A", "A note.", [[("x", "<script>|</b>\r\n\x1b[2J"), ("y", "p < 0.1")]])
    row = table.markdown().splitlines()[4]
    assert r"\<script>\|\</b>\r\n\x1b[2J" in row
    assert "p < 0.1" in row
    assert row.isprintable()


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("broken", [{1}, {2}, {2, 3}, {1, 2, 3}])
def test_an_export_is_never_lost_whichever_rename_fails(tmp_path, monkeypatch, broken):
    """The earlier export is in its place, or in a folder beside it if moving it back fails too."""
    output = tmp_path / "out"

    def fill(aside: Path) -> dict[str, object]:
        (aside / "item").write_text("new" if output.exists() else "old")
        return {}

    write_folder(output, fill, {})
    calls, replace = 0, Path.replace

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls in broken:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(MemvecError, match="cannot be written"):
            write_folder(output, fill, {})
    held = [item.read_text() for item in tmp_path.rglob("item")]
    assert held == ["old"]
    assert output.exists() == (broken != {2, 3})
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1


def test_a_folder_that_becomes_read_only_while_saving_is_one_sentence(mem, tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(MemvecError, match="cannot be written: Permission denied"):
            mem.save(tmp_path / "a.mem")
