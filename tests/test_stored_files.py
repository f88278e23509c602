"""Files that were crammed before, on another processor, are read and decoded exactly.

The files in tests/stored hold letter.txt, crammed with memvec 0.1.0 and torch 2.13 on an AMD EPYC
without AVX-512. A change that breaks one of these tests breaks the files of users. Only new weights
of `pocket` need new files, made in that folder:

    memvec cram letter.txt -o inputs.mem --storage float16
    memvec cram letter.txt -o integers.mem --storage int4 --tokens 48 --set corrections=6
    memvec cram letter.txt -o one-step.mem --storage bfloat16 --one-step --shared-m
    memvec cram letter.txt -o prefix.mem --storage bfloat16 --preset prefix
    memvec cram letter.txt -o usable.mem --storage int8 --preset usable --vectors 4 --tokens 32
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from memvec import MemVectors, decode, load_lm, measure, verify

STORED = Path(__file__).parent / "stored"
FILES = sorted(STORED.glob("*.mem"))
LETTER = (STORED / "letter.txt").read_bytes()


def content(path):
    """The metadata of a safetensors file, and its bytes after them."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    data = path.read_bytes()
    return metadata, data[8 + int.from_bytes(data[:8], "little") :]


@pytest.fixture(scope="module")
def pocket():
    return load_lm("pocket")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
@pytest.mark.slow
def test_a_stored_file_decodes_exactly_and_has_the_recorded_measures(pocket, path):
    mem = MemVectors.load(path)
    assert mem.exact
    assert decode(pocket, mem) == [LETTER.decode()]
    assert verify(pocket, mem)[0]["exact"]
    for result, record in zip(measure(pocket, mem, LETTER), mem.passages, strict=True):
        assert result.exact
        assert result.horizon == record.horizon == record.predicted
        for name in ("lm_bits", "mem_bits", "information_gain", "margin"):
            assert getattr(result, name) == pytest.approx(getattr(record, name), rel=1e-3, abs=0.02)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_stored_file_is_written_as_it_was_read(path, tmp_path):
    """safetensors writes its metadata in any order, so they are compared by name."""
    MemVectors.load(path).save(tmp_path / path.name)
    assert content(tmp_path / path.name) == content(path)


def test_the_stored_files_differ_in_what_decoding_reads():
    """Without this, a file made by a wrong command could test the same way twice."""
    mems = {path.stem: MemVectors.load(path) for path in FILES}
    headers = {name: mem.header for name, mem in mems.items()}
    assert {name: mem.storage.name for name, mem in mems.items()} == {
        "inputs": "float16",
        "integers": "int4",
        "one-step": "bfloat16",
        "prefix": "bfloat16",
        "usable": "int8",
    }
    assert any(p.corrections for p in headers["integers"].passages)
    assert headers["one-step"].layout == "one-step-shared"
    assert headers["prefix"].space is not None
    assert headers["usable"].soft_trigger > 0
    assert headers["usable"].use is not None
