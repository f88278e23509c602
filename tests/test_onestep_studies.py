"""Studies of one-step decoding: orders of the vectors e and m, groups that share m, speed."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch

from conftest import passages, reader, tiny
from memvec.certificate import verify
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.protocols.arrangements import Arranged, Arrangement
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.one_step import OneStep, published_longest, times_faster
from memvec.lab.protocols.one_step_groups import group_means
from memvec.lab.report.contents import all_plots, all_tables
from memvec.lab.report.data import read_data
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.cells import expand
from memvec.lab.study.check import check_study
from memvec.lab.study.pool import StudyUnit, in_units
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.lab.study.vector_files import export_vectors
from memvec.passages.passage import Passage
from memvec.vectors import MemVectors
from studies import HEAD, everything, run, spec_in

pytestmark = pytest.mark.slow  # left out of `make check`

RECIPE = "recipe = { lr = 0.1, steps = 12 }\n"
ARRANGEMENTS = get_args(Arrangement)


def block(protocol: str, more: str) -> str:
    return (
        f'[[runs]]\nprotocol = "{protocol}"\nsources = ["random-tokens"]\nlengths = [2, 4]\n'
        f"{more}{RECIPE}"
    )


ARRANGED = "".join(
    block(
        "one-step-arrangements",
        f'arrangement = "{kind}"\nvectors = [{1 + (kind != "e")}]\npassages = 2\n',
    )
    for kind in ARRANGEMENTS
)
GROUPED = "".join(
    block("one-step-groups", f"group = {group}\nvectors = [2]\npassages = 4\n") for group in (1, 2)
)
TIMED = block("one-step", "vectors = [2]\npassages = 3\ntimed = 2\n")


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "mamba"])
@pytest.mark.parametrize("kind", ARRANGEMENTS)
def test_the_model_reads_every_arrangement_in_its_order(kind: str, family: str) -> None:
    """The outcome's bits equal those of the model's own forward pass on inputs listed by hand."""
    lm, n = tiny(family), 3
    view = lm.read_as(Arranged(kind, n))
    K = 1 if kind == "e" else 2
    enough = Recipe(steps=150, patience=150)  # for the two arrangements that become exact
    (outcome,) = Engine(view, enough, vectors=K, batch_size=1).run(passages(n, seed=7))
    e, m = outcome.vectors[0], outcome.vectors[-1]
    by_hand = {
        "e": [e, e, e],
        "halves": [e, e, m],
        "pairs": [e, m, e],
        "m-for-each": [e, m, m, m],
        "m-for-rest": [e, m, m],
    }[kind]
    with torch.no_grad():
        inputs = torch.stack(by_hand)[None]
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[0, -n:].double()
    ids = torch.tensor(outcome.passage.ids)
    bits = -logits.log_softmax(-1)[torch.arange(n), ids].sum() / torch.tensor(2.0).log()
    assert outcome.metrics.mem_bits == pytest.approx(float(bits), abs=1e-3)
    assert outcome.exact == bool((logits.argmax(-1) == ids).all())
    if kind.startswith("m-for"):
        assert outcome.exact
    order = protocol_of("one-step-arrangements").inputs_at_once(n, n, {"arrangement": kind})
    assert order == [int(v is not e) if K == 2 else 0 for v in by_hand]
    # The order for more tokens, as in a padded batch, begins with the same inputs.
    assert Arranged(kind, n).order(6)[: len(by_hand)] == order  # type: ignore[arg-type]


def test_an_arrangement_takes_its_own_number_of_vectors() -> None:
    view = tiny().read_as(Arranged("e", 4))
    assert view.read_as("prefix") is tiny()
    with pytest.raises(MemvecError, match="the arrangement 'e' takes 1 vectors"):
        view.states(torch.zeros(1, 2, view.width), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(MemvecError, match=r"has one vector: write vectors = .1."):
        parse_spec(HEAD + ARRANGED.replace("vectors = [1]", "vectors = [2]", 1), "spec")
    with pytest.raises(MemvecError, match="option arrangement"):
        parse_spec(HEAD + ARRANGED.replace('"halves"', '"halfs"'), "spec")
    with pytest.raises(MemvecError, match="passages must be a multiple of 2, not 3"):
        parse_spec(HEAD + GROUPED.replace("passages = 4", "passages = 3"), "spec")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study of all three protocols."""
    base = tmp_path_factory.mktemp("one-step")
    text = HEAD + ARRANGED + GROUPED + TIMED
    run(spec_in(base, text), base, base / "out", text)
    return base / "out"


def test_the_check_recomputes_every_row_of_the_three_protocols(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    checked = check_study(study)
    assert checked["rows"] == 20 + 16 + 6
    assert checked["wrong"] == []


def test_vectors_that_a_file_cannot_hold_are_left_out_of_the_files_of_a_study(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    progress: list[tuple[int, int]] = []
    written, left_out = export_vectors(
        study, tmp_path / "files", on_file=lambda *now: progress.append(now)
    )
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert {cells for _, cells in progress} == {len(written) + len(left_out)}
    assert len(progress) == len(written)
    assert {row["protocol"] for row in written} == {"one-step"}
    groups = [sentence for sentence in left_out if "a file has one group" in sentence]
    arranged = [sentence for sentence in left_out if "no name in a file" in sentence]
    assert groups
    assert arranged
    assert len(groups) + len(arranged) == len(left_out)
    for row in written:
        mem = MemVectors.load(tmp_path / "files" / row["file"])
        assert mem.header.layout == "one-step"
        assert (
            row["exact"] == f"{verify(reader(), mem)[0]['exact_passages']} of {len(mem.passages)}"
        )


def test_tables_and_figures_of_one_step_studies(study: Path) -> None:
    with Store(study) as store:
        data = read_data(store)
        tables = {t.key: t for t in all_tables(data, compare=True)}
        plots = {p.key: p for p in all_plots(data, compare=True)}
        times = [
            json.loads(extra)["decode_seconds"]
            for (extra,) in store.db.execute(
                "SELECT extra FROM rows JOIN cells USING (cell) WHERE protocol = 'one-step' "
                "ORDER BY cell, number"
            )
        ]
    arranged = tables["one-step-arrangements"]
    assert [row[3] for row in arranged.rows][:2] == ["[e] × N", "[e] × N"]
    assert len({row[3] for row in arranged.rows}) == len(ARRANGEMENTS)
    assert {row[8] for row in arranged.rows} == {2}
    assert len(plots["one-step-arrangements"].panels[0].series) == len(ARRANGEMENTS)
    groups = tables["one-step-groups"]
    assert {(row[3], row[4], row[-3]) for row in groups.rows} == {(1, 2.0, 4), (2, 1.5, 2)}
    assert [pair is not None for pair in times] == [True, True, False] * 2
    assert all(0 < once < 60 and 0 < steps < 60 for once, steps in filter(None, times))
    speed = tables["one-step-speed"]
    assert {row[-1] for row in speed.rows} == {2}
    assert "Published: 279 times faster" in speed.note
    assert plots["one-step-speed"].panels


def test_passages_of_a_group_share_m_and_others_do_not(study: Path) -> None:
    with Store(study) as store:
        rows = read_data(store).restarts("one-step-groups")
        for cell, part in rows.groupby("cell"):
            settings = store.db.execute("SELECT settings FROM cells WHERE cell=?", (cell,))
            size = json.loads(settings.fetchone()[0])["options"]["group"]
            m = [store.tensors(str(cell), n)[0][1] for n in range(len(part))]
            for i in range(len(m)):
                for j in range(i):
                    assert bool(torch.equal(m[i], m[j])) is (i // size == j // size)


def test_an_m_that_a_group_shares_is_counted_once(study: Path, tmp_path: Path) -> None:
    """The bytes of exact passages are those of e of each passage and m of each group."""
    copied = Path(shutil.copytree(study, tmp_path / "study"))
    with contextlib.closing(sqlite3.connect(copied / "study.sqlite")) as db, db:
        db.execute("UPDATE rows SET exact = 1")
    with Store(copied) as store:
        data = read_data(store)
        (table,) = (t for t in all_tables(data, compare=False) if t.key == "bytes")
        D = data.width(data.rows.iloc[0])
    rows = [row for row in table.rows if row[2] == "one-step-groups"]
    size, ratio = (table.columns.index(name) for name in ("text bytes", "vectors"))
    counted = sorted(float(row[size]) / float(row[ratio]) / (4 * D) for row in rows)
    assert counted == pytest.approx([4 + 2, 4 + 4])


def test_an_interrupted_group_is_crammed_again_with_the_same_result(
    study: Path, tmp_path: Path
) -> None:
    text = HEAD + GROUPED
    base = tmp_path
    run(spec_in(base, text), base, base / "out", text)
    before = everything(base / "out")
    with Store(base / "out", write=True) as store:
        store.db.execute("DELETE FROM rows WHERE number = 1")
    # The whole group is crammed again: one passage in two cells, two passages in two.
    assert run(spec_in(base, text), base, base / "out", text).rows_now == 6
    assert everything(base / "out") == before


def test_an_interrupted_group_shares_one_m_at_another_batch_size(tmp_path: Path) -> None:
    text = (HEAD + GROUPED).replace("batch_size = 3", "batch_size = 1")
    base, out = tmp_path, tmp_path / "out"
    run(spec_in(base, HEAD + GROUPED), base, out, text)
    with Store(out, write=True) as store:
        store.db.execute("DELETE FROM rows WHERE number = 1")
    run(spec_in(base, text), base, out, text)
    with Store(out) as store:
        rows = read_data(store).restarts("one-step-groups")
        for cell, part in rows.groupby("cell"):
            settings = store.db.execute("SELECT settings FROM cells WHERE cell=?", (cell,))
            if json.loads(settings.fetchone()[0])["options"]["group"] == 2:
                assert sorted(part["batch_size"]) == [1, 1, 3, 3]
                first, second = (store.tensors(str(cell), n)[0][1] for n in (0, 1))
                assert torch.equal(first, second)


def test_each_recipe_has_rows_of_its_own_in_the_table_of_groups(tmp_path: Path) -> None:
    text = HEAD + GROUPED + GROUPED.replace(RECIPE, "recipe = { lr = 0.1, steps = 2 }\n")
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out", text)
    with Store(tmp_path / "out") as store:
        data = read_data(store)
        (table,) = (t for t in all_tables(data, compare=False) if t.key == "one-step-groups")
        rows = data.restarts("one-step-groups")
        cells = store.db.execute("SELECT cell, settings FROM cells")
        steps = {cell: json.loads(text)["recipe"]["steps"] for cell, text in cells}
        rows = rows.assign(group=data.option(rows, "group"), asked=rows["cell"].map(steps))
    for row in table.rows:
        asked = int(str(row[1]).removeprefix("random-tokens, steps "))
        same = rows[(rows["asked"] == asked) & (rows["group"] == row[3])]
        same = same[same["length"] == row[2]]
        assert row[5] == pytest.approx(same["accuracy"].mean())
        assert len(same) == row[3] * row[10] == 4
    assert len(table.rows) == 2 * 2 * 2  # recipes by groups by lengths


def test_a_group_is_one_unit_of_work() -> None:
    cell = expand(
        parse_spec(
            HEAD
            + GROUPED.replace("group = 1", "group = 3", 1).replace(
                "passages = 4", "passages = 6", 1
            ),
            "spec",
        )
    )[0].cell
    found = [SourcedPassage(i, Passage((2, 3)), "x") for i in range(6)]
    units = list(in_units(cell, found, 1, 2))
    assert [sorted(u.keys()) for u in units] == [[0, 1, 2], [3, 4, 5]]
    assert [sorted(u.keys()) for u in in_units(cell, found, 1, 2, done={0, 1, 2})] == [[3, 4, 5]]
    rest = units[1].without({4})
    assert isinstance(rest, StudyUnit)
    assert (sorted(rest.keys()), [p.number for p in rest.beside]) == ([3, 5], [4])


def test_group_means_and_factors() -> None:
    rows = pd.DataFrame({"cell": ["a"] * 4, "number": range(4), "accuracy": [1.0, 0.5, 1.0, 1.0]})
    assert group_means(rows, 2).tolist() == [0.75, 1.0]
    timed = pd.DataFrame({"once": [1.0, 1.0], "one_by_one": [3.0, 5.0]})
    assert times_faster(timed).value == 4


def test_restarts_of_a_group_do_not_count_as_groups() -> None:
    """The means are over groups if there are several, and over restarts if there is one."""
    rows = pd.DataFrame({"number": range(4), "accuracy": [1.0, 0.5, 1.0, 0.0]}).assign(cell="a")
    restart = rows.assign(cell="b", accuracy=[1.0, 0.5, 0.0, 0.0])
    both = pd.concat([rows, restart])
    assert group_means(both, 2).tolist() == [0.75, 0.25]
    assert group_means(both, 4).tolist() == [0.625, 0.375]


@pytest.mark.parametrize(("once", "words"), [(0.01, "slower in"), (0.0001, "times as fast.")])
def test_the_caption_on_speed_states_which_way_is_faster(
    study: Path, monkeypatch: pytest.MonkeyPatch, once: float, words: str
) -> None:
    timed = OneStep._timed
    monkeypatch.setattr(
        OneStep, "_timed", lambda self, data: timed(self, data).assign(once=once, one_by_one=0.005)
    )
    with Store(study) as store:
        plots = {p.key: p for p in all_plots(read_data(store), compare=False)}
    assert words in plots["one-step-speed"].caption


def test_the_longest_published_lengths() -> None:
    def values(model: str, source: str) -> list[object]:
        return [value for _, value in published_longest(model, source)]

    assert values("meta-llama/Llama-3.1-8B", "pg19") == [
        724,
        362,
        pytest.approx(1660 / 0.693147, rel=1e-5),
    ]
    assert values("EleutherAI/pythia-410m", "random-words")[:2] == [92, 22]
    assert values("pocket", "pg19") == [None] * 3
