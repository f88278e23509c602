"""Documents give their bytes back, and are cut into passages by bits or by tokens."""

from __future__ import annotations

import io
import itertools
import math
import random
from copy import copy

import pytest
import torch

from conftest import reader, tiny
from memvec.errors import MemvecError, NotExactError
from memvec.model import memory
from memvec.passages.cutting import Cutter, surprisals
from memvec.passages.documents import (
    CLOSE_LOOK,
    Document,
    apply_edits,
    edits_between,
    peek,
    read_document,
    restore,
)
from memvec.passages.passage import Passage

TEXTS = {
    "english": "The quick brown fox jumps over the lazy dog.",
    "emoji": "a 👩‍👩‍👧‍👦 and a 🏳️‍🌈, e\u0301 and é",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n",
    "tabs": "\tdef f(x):\n\t\treturn  x\t# twice  \n",
    "chinese": "敏捷的棕色狐狸跳过了懒狗。道可道，非常道。",
    "ends with an empty line": "the cat\n\n",
    "spaces only": "   \n \t ",
    "special tokens": "<s> is not the start and </s> is not the end <s>",
    "byte order mark": "\ufefftext",
    "zero and controls": "a\x00b\x07\x85\u2028c\x0b\x0cd",
    "arabic": "كان يا ما كان، في قديم الزمان",
    "one letter": "x",
    "code": 'for (int i = 0; i < n; ++i) { printf("%d\\n", i); }  // 100 %\n',
}


# ---------------------------------------------------------------------- bytes back


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_text_comes_back_to_the_byte(kind, name):
    lm, text = reader(kind), TEXTS[name]
    if (kind, name) == ("words", "spaces only"):  # a tokenizer of words makes no token of them
        with pytest.raises(MemvecError, match="makes no tokens"):
            Document.of(lm, text, name=name)
        return
    document = Document.of(lm, text, name=name)
    assert document.size == len(text.encode())
    back = restore(lm, document.ids, document)
    assert back == text.encode()


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"special tokens"}))
def test_a_byte_level_tokenizer_needs_no_edits(name):
    assert Document.of(reader(), TEXTS[name]).edits == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le"])
def test_encodings_come_back_to_the_byte(encoding):
    lm, data = reader(), "\ufeffné à Zürich\r\n".lstrip("\ufeff").encode(encoding)
    document = Document.of(lm, data, encoding=encoding)
    found = restore(lm, document.ids, document)
    assert found == data


def test_any_bytes_are_latin_1():
    lm, data = reader(), bytes(range(256))
    document = Document.of(lm, data, encoding="latin-1")
    assert restore(lm, document.ids, document) == data


@pytest.mark.parametrize(
    ("text", "encoding", "sentence"),
    [
        ("", "utf-8", "is empty"),
        (b"", "utf-8", "is empty"),
        (b"\xff\xfe\x00", "utf-8", "use encoding='latin-1'"),
        (b"abc", "utf-7000", "unknown encoding 'utf-7000'"),
        ("abc", "utf-7000", "unknown encoding 'utf-7000'"),
        ("abc", "rot13", "unknown encoding 'rot13'"),
        ("né", "ascii", "has characters that are not ascii"),
        ("\ud800", "utf-8", "has characters that are not utf-8"),
        (b"a\x00b\x00", "utf-16", "does not survive the encoding utf-16"),
    ],
)
def test_a_text_that_cannot_be_a_document_is_refused(text, encoding, sentence):
    with pytest.raises(MemvecError, match=sentence):
        Document.of(reader(), text, encoding=encoding)


def test_wrong_tokens_never_give_wrong_bytes():
    lm = reader()
    document = Document.of(lm, "the lazy dog")
    wrong = [*document.ids[:-1], document.ids[-1] ^ 1]
    with pytest.raises(NotExactError, match="its bytes did not"):
        restore(lm, wrong, document)


@pytest.mark.parametrize("seed", range(40))
def test_edits_turn_one_text_into_another(seed):
    random_ = random.Random(seed)
    alphabet = "ab \n\r\t\u2028é👩"
    old = "".join(random_.choice(alphabet) for _ in range(random_.randrange(60)))
    letters = list(old)
    for _ in range(random_.randrange(8)):
        at = random_.randrange(len(letters) + 1)
        letters[at : at + random_.randrange(4)] = random_.choices(alphabet, k=random_.randrange(4))
    new = "".join(letters) if seed % 4 else old[::-1]
    edits = list(edits_between(old, new))
    assert apply_edits(old, edits) == new
    assert bool(edits) == (old != new)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(edits))


def test_a_large_change_is_one_edit_and_a_small_one_stays_small():
    old = "x" * (CLOSE_LOOK + 1)
    assert list(edits_between(old, "y")) == [(0, len(old), "y")]
    pages = "".join(f"line {i}\n" for i in range(2000))
    (edit,) = edits_between(pages, pages.replace("line 1234\n", "line 1x34\n"))
    assert edit[2] == "x"


@pytest.mark.parametrize("edits", [[(2, 1, "")], [(0, 99, "")], [(3, 4, ""), (1, 2, "")]])
def test_edits_that_do_not_fit_are_refused(edits):
    with pytest.raises(NotExactError, match="do not fit"):
        apply_edits("abcdef", edits)


# ---------------------------------------------------------------------- files


def test_files_that_cannot_be_read_are_refused(tmp_path):
    lm = reader()
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(b"a" * 101)
    for path, sentence in [
        (tmp_path, "is a directory"),
        (tmp_path / "none", "there is no file"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "large", "larger than 100 bytes"),
    ]:
        with pytest.raises(MemvecError, match=sentence):
            read_document(lm, str(path), largest=100)
    with pytest.raises(MemvecError, match="is empty"):
        peek(str(tmp_path / "empty"))
    (tmp_path / "fits").write_bytes(b"a" * 100)
    assert read_document(lm, str(tmp_path / "fits"), largest=100).size == 100


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("text")
    monkeypatch.setattr("memvec.passages.documents.peek", lambda *_: None)
    monkeypatch.setattr(
        "pathlib.Path.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no permission"))
    )
    with pytest.raises(MemvecError, match=r"cannot be read: no permission\.$"):
        read_document(reader(), str(file))


# ---------------------------------------------------------------------- cutting


def slow_surprisals(lm, ids):
    """Bits of each token after BOS, by one forward pass of the model for each token."""
    found = []
    for t in range(len(ids)):
        before = torch.tensor([[lm.bos_id, *ids[:t]]])
        with torch.no_grad():
            logits = lm.model(input_ids=before, use_cache=False).logits[0, -1].double()
        found.append(float(-logits.log_softmax(-1)[ids[t]] / math.log(2)))
    return found


@pytest.mark.parametrize("chunk", [1, memory.LOGITS_AT_ONCE])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_surprisals_are_the_models_own(family, chunk, monkeypatch):
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", chunk)
    lm, ids = tiny(family), [5, 3, 3, 9, 20, 7]
    found = surprisals(lm, ids)
    assert found.tolist() == pytest.approx(slow_surprisals(lm, ids), rel=1e-4, abs=1e-4)
    monkeypatch.setattr(lm, "bos_id", None)
    without = surprisals(lm, ids)
    assert float(without[0]) == pytest.approx(math.log2(lm.vocab_size))
    assert len(without) == len(ids)
    assert surprisals(lm, [4]).tolist() == pytest.approx([math.log2(lm.vocab_size)])


def test_the_logits_of_a_long_text_are_never_in_memory_at_once(monkeypatch):
    lm, rows = copy(tiny("llama")), []
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 4 * lm.vocab_size)
    head = lm.head
    monkeypatch.setattr(lm, "head", lambda states: rows.append(states.shape[1]) or head(states))
    surprisals(lm, random_ids(10))
    assert rows == [4, 4, 2]


def test_a_rest_that_does_not_fit_the_passage_before_takes_a_token_of_it():
    cutter = Cutter(tiny(), tokens=10, max_tokens=10, min_tokens=2)
    assert [len(p) for p in cutter.cut(random_ids(21))] == [10, 9, 2]
    cutter = Cutter(tiny(), tokens=10, min_tokens=2)
    assert [len(p) for p in cutter.cut(random_ids(21))] == [10, 11]


def random_ids(n: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 24, (n,), generator=generator).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("most", [None, 10])
@pytest.mark.parametrize("bits", [0.5, 20.0, 90.0, 100_000.0])
def test_passages_are_as_long_as_their_bits_allow(bits, most, least):
    lm, ids = tiny(), random_ids(100)
    found = list(Cutter(lm, bits=bits, max_tokens=most or 100, min_tokens=least).cut(ids, 7))
    assert [token for p in found for token in p.ids] == ids
    assert [p.offset for p in found] == [0, *itertools.accumulate(len(p) for p in found)][:-1]
    assert {p.document for p in found} == {7}
    assert min(len(p) for p in found) >= least
    for passage in found:
        cost = float(surprisals(lm, passage.ids).sum())
        assert len(passage) <= (most or 100) + least - 1
        assert cost <= bits + 1e-6 or len(passage) <= max(1, 2 * least - 1)
        end = passage.offset + len(passage)
        if end < len(ids) and len(passage) < (most or 100):
            assert float(surprisals(lm, [*passage.ids, ids[end]]).sum()) > bits - 1e-6


@pytest.mark.parametrize("least", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 4, 7, 1000])
@pytest.mark.parametrize("n", [5, 28, 29, 30])
def test_passages_have_the_given_number_of_tokens(n, tokens, least):
    ids = list(range(n))
    found = list(Cutter(tiny(), tokens=tokens, min_tokens=least).cut(ids))
    assert [token for p in found for token in p.ids] == ids
    assert min(len(p) for p in found) >= least
    assert {len(p) for p in found[:-1]} <= {max(tokens, least)}
    assert len(found[-1]) < max(tokens, least) + least


def test_cutting_reads_no_more_than_the_next_passage_needs(monkeypatch):
    lm, asked = copy(tiny()), []
    states = lm.states
    monkeypatch.setattr(
        lm, "states", lambda none, ids, rule: asked.append(ids.shape[1]) or states(none, ids, rule)
    )
    passages = Cutter(lm, bits=30.0, max_tokens=100).cut(random_ids(5000))
    assert asked == []
    first = next(passages)
    assert 0 < sum(asked) <= 64
    assert 1 <= len(first) < 64


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"tokens": 0}, "^tokens must be at least 1"), ({"tokens": 9, "max_tokens": 8}, "at most 8")],
)
def test_lengths_that_cannot_be_cut_are_refused(options, sentence):
    with pytest.raises(MemvecError, match=sentence):
        Cutter(tiny(), **options)


@pytest.mark.parametrize("options", [{}, {"bits": 1.0, "tokens": 1}])
def test_a_cutter_takes_bits_or_tokens_but_not_both(options):
    with pytest.raises(ValueError, match="either bits or tokens"):
        Cutter(tiny(), **options)


@pytest.mark.parametrize("n", [2, 3, 10, 11])
def test_the_halves_of_a_passage_join_to_it(n):
    passage = Passage(tuple(range(n)), 3, 40)
    a, b = passage.halves()
    assert a.ids + b.ids == passage.ids
    assert (a.offset, b.offset) == (40, 40 + len(a))
    assert abs(len(a) - len(b)) <= 1
    assert {a.document, b.document} == {3}


def test_a_passage_without_tokens_is_refused():
    with pytest.raises(MemvecError, match="at least one token"):
        Passage(())


@pytest.mark.parametrize("size", [99, 100, 101, 5000])
@pytest.mark.parametrize("where", ["file", "-"])
def test_a_text_that_is_too_large_is_refused(size, where, tmp_path, monkeypatch):
    lm, data = reader(), b"a" * size
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    path = "-" if where == "-" else str(tmp_path / "file")
    if size > 100:
        with pytest.raises(MemvecError, match="is larger than 100 bytes"):
            read_document(lm, path, largest=100)
    else:
        assert read_document(lm, path, largest=100).data(lm) == data


@pytest.mark.parametrize("text", ["The cat", "thé ÇAT", "the 👍 cat 日本語", "Ünïcode"])
def test_edits_restore_a_text_that_the_tokenizer_changes(text):
    lm = reader("words")
    document = Document.of(lm, text)
    assert document.edits
    assert apply_edits(lm.text(document.ids), document.edits) == text
