"""A small study of a tiny model, for the tests of studies and reports."""

from __future__ import annotations

from pathlib import Path

import torch

from conftest import reader
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.run import StudyStatus, run_study
from memvec.lab.study.spec import ModelSpec, Spec, parse_spec
from memvec.lab.study.store import Store

HEAD = """
name = "small"
batch_size = 3
[[models]]
name = "tiny"
[[sources]]
kind = "random-tokens"
[[sources]]
name = "book"
kind = "files"
path = "book.txt"
chunk_words = [40, 80]
"""

EVERYTHING = (
    HEAD
    + """
[[runs]]
protocol = "exact"
lengths = [5]
passages = 4
budget = 400
[[runs]]
protocol = "paper"
lengths = [4, 6]
passages = 3
recipe = { lr = 0.1, steps = 12 }
[[runs]]
protocol = "vectors"
sources = ["random-tokens"]
lengths = [3]
vectors = [1, 2]
passages = 2
recipe = { steps = 12 }
[[runs]]
protocol = "threshold"
lengths = [3, 9]
passages = 3
recipe = { lr = 0.1, steps = 12 }
[[runs]]
protocol = "context"
sources = ["book"]
lengths = [4]
passages = 2
contexts = [4, 8, 4000]
recipe = { lr = 0.1, steps = 8 }
[[runs]]
protocol = "copy"
sources = ["random-tokens"]
lengths = [4]
passages = 2
recipe = { lr = 0.1, steps = 8 }
[[runs]]
protocol = "upper-bound"
lengths = [4]
passages = 2
recipe = { lr = 0.1, steps = 8 }
[[runs]]
protocol = "one-step"
lengths = [2, 4]
vectors = [2]
passages = 2
recipe = { lr = 0.1, steps = 12 }
[[runs]]
protocol = "geometry"
sources = ["random-tokens"]
lengths = [3]
seeds = [0, 1, 2]
passages = 2
recipe = { lr = 0.1, steps = 8 }
"""
)

# Not in EVERYTHING; tests of the protocol 'usable' add it to HEAD.
USABLE = """
[[runs]]
protocol = "usable"
sources = ["random-tokens"]
lengths = [4]
vectors = [2]
passages = 2
texts = 2
words = 5
layers = true
directions = true
recipe = { settle = 8, decay = 8, steps = 12, query_count = 2, query_tokens = 4, trigger = "#3" }
"""

SENTENCES = "The quick brown fox jumps over the lazy dog. A cat sat on the mat and the dog saw. "


def spec_in(folder: Path, text: str = EVERYTHING) -> Spec:
    """A spec whose book is in `folder`."""
    (folder / "book.txt").write_text(SENTENCES * 30, "utf-8")
    return parse_spec(text, "test")


def run(spec: Spec, base: Path, out: Path, text: str = "") -> StudyStatus:
    """Run a spec with the tiny model of conftest."""
    return run_study(spec, out, maker, base=base, toml=text)


def maker(model: ModelSpec) -> LocalPool:
    """The tiny model, for every name of a model."""
    return LocalPool(reader())


def everything(folder: Path) -> dict[tuple[str, int], tuple[object, ...]]:
    """All rows by cell and number, without their times and with the digests of their vectors."""
    with Store(folder) as store:
        rows = store.db.execute(
            "SELECT cell, number, passage, status, exact, horizon, accuracy, steps, spent, digest, "
            "lm_bits, mem_bits, margin FROM rows"
        ).fetchall()
        for row in rows:
            vectors, _ = store.tensors(row[0], row[1])
            assert torch.isfinite(vectors.float()).all()
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2:] for row in rows}
