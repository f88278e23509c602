"""The source and the protocol `book`: a whole text in blocks, and how many vectors it needs."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from conftest import reader
from memvec.errors import MemvecError
from memvec.lab.protocols.book import tokens_per_vector
from memvec.lab.report.contents import all_tables
from memvec.lab.report.data import read_data
from memvec.lab.sources.book import Block, WholeBook
from memvec.lab.study.check import check_study
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from studies import SENTENCES, run

pytestmark = pytest.mark.slow  # left out of `make check`

SPEC = """
name = "whole"
[[models]]
name = "tiny"
[[sources]]
name = "whole"
kind = "book"
path = "book.txt"
[[runs]]
protocol = "book"
lengths = [3]
passages = 4
recipe = { steps = 12 }
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(SENTENCES * 3, "utf-8")
    return tmp_path


def test_blocks_joined_are_the_beginning_of_the_text(base: Path) -> None:
    lm, source = reader(), WholeBook(path="book.txt", name="whole")
    ids = lm.tokenize(SENTENCES * 3)
    blocks = list(source.passages(lm, len(ids) // 5, 5, base))
    assert [t for b in blocks for t in b.passage.ids] == ids[: 5 * len(blocks)]
    assert [b.before[-2:] for b in blocks[1:]] == [b.passage.ids[-2:] for b in blocks[:-1]]
    assert blocks[0].before == ()
    assert all(isinstance(b, Block) and b.whole == len(ids) for b in blocks)
    with pytest.raises(MemvecError, match=f"{len(ids) // 5} blocks of 5: lower passages from 900"):
        next(source.passages(lm, 900, 5, base))
    with pytest.raises(MemvecError, match="source 'whole' needs a path"):
        next(WholeBook(name="whole").passages(lm, 1, 5, base))
    assert "source missing" in str(WholeBook(path="none.txt").missing(base))


def test_a_study_reports_how_many_vectors_the_text_needs(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    run(parse_spec(SPEC, "spec"), base, base / "out", SPEC)
    again = SPEC.replace("lengths = [3]", "lengths = [3, 5]")  # block 1 begins elsewhere
    assert run(parse_spec(again, "spec"), base, base / "out", again).rows_now == 4
    assert check_study(base / "out")["wrong"] == []
    with Store(base / "out") as store:
        data = read_data(store)
        table = next(t for t in all_tables(data, compare=True) if t.key == "book")
    whole = len(reader().tokenize(SENTENCES * 3))
    for row in table.rows:
        length, rate = row[2], float(row[6])  # type: ignore[arg-type]
        horizons = data.rows[data.rows["length"] == length]["horizon"]
        assert rate == pytest.approx(horizons.mean())
        assert row[9] == whole
        assert row[10] == (math.ceil(whole / rate) if rate else None)
        assert row[13] == (math.ceil(119203 / rate) if rate else None)


def test_tokens_per_vector_are_the_horizon_divided_by_k() -> None:
    rows = pd.DataFrame({"horizon": [8, 4], "vectors": [2, 2]})
    assert tokens_per_vector(rows).value == 3
    assert tokens_per_vector(rows).low == 2
