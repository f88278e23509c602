"""Sources of passages: files, words, tokens, data sets of the Hub, and the rules of the paper."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import types
from copy import copy, deepcopy
from pathlib import Path
from typing import cast

import pytest
import torch
from tokenizers import AddedToken

from conftest import reader
from memvec.errors import MemvecError
from memvec.lab.sources import SOURCES, Source, SourcedPassage
from memvec.lab.sources.files import Files
from memvec.lab.sources.random_tokens import RandomTokens, ordinary_tokens
from memvec.lab.sources.random_words import RandomWords, read_words
from memvec.lab.sources.sampled import Sampled
from memvec.lab.sources.text_readers import read_hub_texts, read_texts
from memvec.lab.sources.written import _leading_ids, chunk, sentences, split_by_rule
from memvec.lab.study.cells import expand
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.work import find_passages
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from studies import HEAD, SENTENCES


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(SENTENCES * 30, "utf-8")
    (tmp_path / "words.txt").write_text("cat\ndog\nfox\nmat\n", "utf-8")
    return tmp_path


def every_source(base: Path) -> list[Source]:
    return [
        Files(name="f", path=str(base / "book.txt"), chunk_words=(30, 60)),
        RandomWords(name="w", words=str(base / "words.txt")),
        RandomTokens(name="t"),
        Sampled(name="s"),
    ]


@pytest.mark.parametrize("words", [(100, 50), (0, 5), (-3, -1)])
def test_chunks_of_no_words_are_refused(book: Path, words: tuple[int, int]) -> None:
    source = Files(name="f", path=str(book / "book.txt"), chunk_words=words)
    assert str(source.missing(None)).startswith("source 'f': chunk_words are [fewest, most], not [")
    assert Files(name="f", path=str(book / "book.txt"), chunk_words=(5, 5)).missing(None) is None


def test_a_passage_does_not_depend_on_the_number_and_length_of_passages(book: Path) -> None:
    lm = reader()
    for source in every_source(book):
        many = list(source.passages(lm, 4, 12))
        few = list(source.passages(lm, 2, 7))
        for a, b in zip(few, many, strict=False):
            assert b.passage.ids[:7] == a.passage.ids, source.name
        assert [f.number for f in many] == [0, 1, 2, 3]
        assert all(len(f.passage) == 12 for f in many)
        assert len({f.passage.ids for f in many}) > 1
        reseeded = source.model_copy(update={"seed": 1})
        assert [f.passage.ids for f in reseeded.passages(lm, 4, 12)] != [
            f.passage.ids for f in many
        ]


def test_the_suffix_rule_takes_the_second_half_of_the_sentences() -> None:
    text = "One is here. Two is here. Three is here! Is four here? Five."
    assert sentences(text) == [
        "One is here.",
        "Two is here.",
        "Three is here!",
        "Is four here?",
        "Five.",
    ]
    assert split_by_rule(text, "suffix") == (
        "One is here. Two is here.",
        "Three is here! Is four here? Five.",
    )
    assert split_by_rule(text, "start") == ("", text)


def test_the_context_of_a_passage_is_the_text_in_front_of_it(book: Path) -> None:
    lm = reader()
    (found,) = Files(path=str(book / "book.txt"), chunk_words=(30, 60)).passages(lm, 1, 8)
    together = lm.text([*found.before, *found.passage.ids])
    assert " ".join(together.split()) in " ".join((SENTENCES * 30).split())


def test_chunks_have_the_number_of_words_and_are_sentences_in_a_row() -> None:
    texts = [("a", SENTENCES * 30), ("b", SENTENCES * 40), ("short", "Too short.")]
    for number in range(6):
        drawn = chunk(texts, number, (100, 150))
        assert drawn.text_name != "short"
        assert 90 <= len(drawn.text.split()) <= 170
        parts = sentences(dict(texts)[drawn.text_name])
        span = parts[drawn.first : drawn.first + drawn.sentences]
        assert drawn.text == " ".join(" ".join(span).split())
        assert chunk(texts, number, (100, 150)) == drawn
    with pytest.raises(MemvecError, match="no text has the 5000 words"):
        chunk(texts, 0, (5000, 6000))


@pytest.mark.parametrize("rule", ["start", "suffix"])
@pytest.mark.parametrize("words", [(40, 60), (100, 130)])
def test_no_two_chunks_have_the_same_passage(rule, words, tmp_path: Path) -> None:
    """The text is not much longer than a chunk, so few exist; fewer passages are the first ones."""
    numbered = [f"Number {i} is a cat that sat on the mat near dog {i} ." for i in range(12)]
    (tmp_path / "book.txt").write_text(" ".join(numbered))
    lm, source = reader(), Files(path=str(tmp_path / "book.txt"), chunk_words=words, rule=rule)
    drawn, found = source.passages(lm, 40, 8), []
    with pytest.raises(MemvecError, match="lower passages, or chunk_words"):
        found.extend(drawn)
    places = {(passage.passage.ids, passage.before) for passage in found}
    assert 1 <= len(places) == len(found) < 12
    few = list(source.passages(lm, len(found), 8))
    assert [p.passage for p in few] == [p.passage for p in found]


def test_rows_of_a_data_set_are_selected_by_their_values(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "lang": "en" if i % 2 else "de"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read_hub_texts(str(tmp_path), where={"lang": "en"})
    assert [text for _, text in found] == ["row 1", "row 3"]
    assert [name.rsplit(" ", 1)[1] for name, _ in found] == ["1", "3"]
    with pytest.raises(MemvecError, match="has no column 'year'"):
        read_hub_texts(str(tmp_path), where={"year": "1900"})
    says = Files(name="f", path="-", where={"lang": "en"}).missing(None)
    assert says == "source 'f': where is for tables, and standard input is a text."


def test_random_words_are_of_the_list_which_the_settings_name(book: Path) -> None:
    source = RandomWords(words="words.txt")
    (found,) = source.passages(reader(), 1, 20, book)
    text = reader().text(found.passage.ids)
    assert set(text.split()[:-1]) <= {"cat", "dog", "fox", "mat"}
    assert "4 words" in source.settings(book)["list"]
    assert "wordfreq en, 100000 words" in RandomWords().settings()["list"]
    drawn = RandomWords(words="words.txt", drawn_lengths=True).passages(reader(), 12, 20, book)
    assert len({len(f.passage) for f in drawn}) > 4
    (one,) = RandomWords(words="words.txt", drawn_lengths=True).passages(reader(), 1, 1, book)
    assert len(one.passage) == 1


def test_a_passage_of_long_words_has_all_its_tokens() -> None:
    """The part of the text that is tokenized first has too few tokens."""
    lm = cast(
        "FrozenLM", types.SimpleNamespace(tokenize=lambda text: [len(w) for w in text.split()])
    )
    text = " ".join(["x" * 40] * 30)
    assert _leading_ids(lm, text, 20)[:20] == [40] * 20


def test_random_tokens_are_no_special_tokens() -> None:
    lm = reader()
    tokens = ordinary_tokens(lm)
    assert not set(tokens) & set(lm.tokenizer.all_special_ids)
    assert len(tokens) == len(lm.tokenizer) - 2


def test_special_tokens_without_a_role_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are Llama's reserved tokens and Qwen's chat tokens; other added tokens are text."""
    lm = copy(reader())
    monkeypatch.setattr(lm, "tokenizer", deepcopy(lm.tokenizer))
    added = {5: AddedToken("<|reserved|>", special=True), 6: AddedToken("word", special=False)}
    monkeypatch.setattr(type(lm.tokenizer), "added_tokens_decoder", added)
    assert 5 not in lm.tokenizer.all_special_ids
    assert 6 in ordinary_tokens(lm)
    assert 5 not in ordinary_tokens(lm)
    logits = torch.zeros(lm.vocab_size)
    logits[[5, 6]] = 50.0
    monkeypatch.setattr(lm, "logits", lambda vectors, ids: logits.expand(1, ids.shape[1], -1))
    (drawn,) = Sampled().passages(lm, 1, 8)
    assert set(drawn.passage.ids) == {6}


def test_sampled_passages_go_on_where_shorter_ones_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn once for all lengths, and are those that one long draw gives."""
    drawn: list[int] = []
    lm, at_once = copy(reader()), copy(reader())
    logits = lm.logits
    monkeypatch.setattr(lm, "logits", lambda *a: drawn.append(a[1].shape[1]) or logits(*a))
    ids = {n: [p.passage.ids for p in Sampled().passages(lm, 2, n)] for n in (5, 3, 9)}
    assert drawn == [*range(1, 6)] * 2 + [*range(6, 10)] * 2
    assert ids[9] == [p.passage.ids for p in Sampled().passages(at_once, 2, 9)]
    for n in (3, 5):
        assert ids[n] == [whole[:n] for whole in ids[9]]
    assert ids[9] != [p.passage.ids for p in Sampled(seed=1).passages(lm, 2, 9)]
    assert ids[9] != [p.passage.ids for p in Sampled(temperature=9.0).passages(lm, 2, 9)]


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    import pandas as pd

    rows = [{"body": "First text.", "part": "a"}, {"body": "Second text.", "part": "b"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv")
    for kind in ("jsonl", "parquet", "csv"):
        found = read_texts(f"x.{kind}", tmp_path, "body", {"part": "b"})
        assert [text for _, text in found] == ["Second text."]
    with pytest.raises(MemvecError, match="has no column 'text'; it has body, part"):
        read_texts("x.jsonl", tmp_path)
    with pytest.raises(MemvecError, match="source missing"):
        read_texts("nothing.txt", tmp_path)
    (tmp_path / "a.txt").write_text("A.")
    assert len(read_texts(".", tmp_path, "body")) == 7


def test_without_pyarrow_a_sentence_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Unable to find a usable engine")

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("pandas.read_parquet", missing)
    with pytest.raises(MemvecError, match=r"^reading x\.parquet needs pyarrow: pip install"):
        read_texts("x.parquet", tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_are_selected_by_the_values_of_the_file(tmp_path: Path, kind: str) -> None:
    """A missing value in a column does not make 1.0 of 1, and the text 'NA' is a text."""
    import pandas as pd

    rows = [{"text": "One.", "label": 1}, {"text": "Two."}, {"text": "NA", "label": 2}]
    rows += [{"text": "1984", "label": 1}]
    if kind == "jsonl":
        lines = [{"label": 3}, *rows]  # the first row has no text
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif kind == "csv":
        (tmp_path / "x.csv").write_text("text,label\nOne.,1\nTwo.,\nNA,2\n1984,1\n")
    else:
        frame = pd.DataFrame(rows)
        frame.astype({"label": "Int64"}).to_parquet(tmp_path / "x.parquet")
    found = read_texts(f"x.{kind}", tmp_path, where={"label": "1"})
    assert [text for _, text in found] == ["One.", "1984"]
    assert [text for _, text in read_texts(f"x.{kind}", tmp_path)] == ["One.", "Two.", "NA", "1984"]
    with pytest.raises(MemvecError, match=rf"no row of x.{kind} has a text where label is '9'\."):
        read_texts(f"x.{kind}", tmp_path, where={"label": "9"})
    with pytest.raises(MemvecError, match="has no column 'lang'; it has "):
        read_texts(f"x.{kind}", tmp_path, where={"lang": "en"})


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv"])
def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path: Path, name: str) -> None:
    text = {"x.txt": "One.", "x.jsonl": '{"text": "One."}', "x.csv": "text\nOne.\n"}[name]
    (tmp_path / name).write_text(text, "utf-8-sig")
    assert [text for _, text in read_texts(name, tmp_path)] == ["One."]


def test_word_files_are_utf_8(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\ndog\n", "utf-8-sig")
    assert read_words("words.txt", tmp_path) == ("cat", "dog")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "is not UTF-8 text (byte 3)" in str(RandomWords(words="latin.txt").missing(tmp_path))


def test_passages_that_a_source_cannot_give_are_an_error(book: Path) -> None:
    lm = reader()
    with pytest.raises(
        MemvecError, match=r"3 passages were asked of source .*, which has 1 text: "
    ):
        list(Files(path=str(book / "book.txt")).passages(lm, 3, 4))
    with pytest.raises(MemvecError, match=r"for a passage of 100000: .*, or take longer texts"):
        list(Files(path=str(book / "book.txt")).passages(lm, 1, 100_000))
    with pytest.raises(MemvecError, match="could not be read from the Hub"):
        list(SOURCES["pg19"](name="p").passages(lm, 1, 4))


# ---------------------------------------------------------------------- data sets of the Hub


@pytest.fixture
def chunk_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set like the paper's chunk sets: split 'train', pandas' row number, 'text'."""
    import datasets
    import pandas as pd

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"{SENTENCES}This is chunk {i}. {SENTENCES}" for i in range(5)]
    table = pd.DataFrame({"Unnamed: 0": range(6), "text": [*texts, None]})
    (tmp_path / "set" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    table.to_csv(tmp_path / "chunks.csv", index=False)  # as `download_texts.sh` writes it
    return tmp_path


@pytest.mark.parametrize("kind", ["pg19", "fanfics"])
def test_the_papers_chunk_sets_are_read_by_their_own_columns(chunk_set: Path, kind: str) -> None:
    lm = reader()
    from_set = SOURCES[kind](dataset=str(chunk_set / "set"))
    from_csv = SOURCES[kind](path=str(chunk_set / "chunks.csv"))
    for source in (from_set, from_csv):
        found = list(source.passages(lm, 5, 12))
        for i, one in enumerate(found):
            # The paper's rule by hand: second half of the sentences, joined, first T tokens.
            parts = sentences(f"{SENTENCES}This is chunk {i}. {SENTENCES}")
            expected = lm.tokenize(" ".join(parts[len(parts) // 2 :]))[:12]
            assert list(one.passage.ids) == expected
        with pytest.raises(MemvecError, match=r"6 passages were asked of .*, which has 5 texts: "):
            list(source.passages(lm, 6, 12))  # the row without a text does not count
    assert SOURCES[kind](name="x").dataset.startswith("yurakuratov/")
    with pytest.raises(MemvecError, match="has no column 'body'; it has Unnamed: 0, text"):
        read_hub_texts(str(chunk_set / "set"), column="body")
    with pytest.raises(MemvecError, match="has no revision 'v1'"):
        read_hub_texts(str(chunk_set / "set"), revision="v1")


def test_rows_of_a_hub_set_name_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    class Builder:
        hash = "0123456789" * 4

        def download_and_prepare(self) -> None: ...

        def as_dataset(self, split: str) -> datasets.Dataset:
            asked.append(split)
            return datasets.Dataset.from_dict({"text": ["A.", "B."]})

    def builder(name: str, revision: str | None) -> Builder:
        asked.append((name, revision))
        return Builder()

    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    found = read_hub_texts("owner/set", "validation", revision="main")
    assert found == [("owner/set@012345678901 row 0", "A."), ("owner/set@012345678901 row 1", "B.")]
    assert asked == [("owner/set", "main"), "validation"]


def test_standard_input_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text in (SENTENCES, "Another text."):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        for _ in range(2):
            assert read_texts("-") == [("standard input", text)]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\ufeff{SENTENCES}"))
    assert read_texts("-") == [("standard input", SENTENCES)]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(MemvecError, match="standard input is closed: name a file"):
        read_texts("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    with pytest.raises(MemvecError, match="standard input is not UTF-8"):
        read_texts("-")


def test_lines_of_json_end_at_newlines_only(tmp_path: Path) -> None:
    texts = ["One\u2028two.", "Three\x85four\u2029five.", "Six."]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "x.jsonl").write_text("\r\n".join([*lines, ""]), "utf-8", newline="")
    assert [text for _, text in read_texts("x.jsonl", tmp_path)] == texts


def test_files_that_are_not_of_their_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "A."}\n{"text": ')
    with pytest.raises(MemvecError, match=r"bad.jsonl line 2 is not JSON"):
        read_texts("bad.jsonl", tmp_path)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(MemvecError, match="line 1 is not an object"):
        read_texts("list.jsonl", tmp_path)
    (tmp_path / "half.jsonl").write_text('{"text": "half of a pair: \\ud83d"}\n')
    with pytest.raises(MemvecError, match=r"half row 0 has characters that are not utf-8"):
        read_texts("half.jsonl", tmp_path)
    (tmp_path / "folder" / "notes.md").mkdir(parents=True)  # a folder, whatever its name ends with
    (tmp_path / "folder" / "notes.md" / "a.txt").write_text("A.")
    assert read_texts("folder", tmp_path) == [("a", "A.")]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(MemvecError, match="is not UTF-8 text"):
        read_texts("latin.txt", tmp_path)
    for name, data in (
        ("latin.csv", b"text\ncaf\xe9\n"),
        ("ragged.csv", b"text\na,b\nc,d,e,f\n"),
        ("text.parquet", b"no table at all, only a text"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MemvecError, match=f"{name} is not a {name.split('.')[1]} table") as one:
            read_texts(name, tmp_path)
        assert "\n" not in str(one.value)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(MemvecError, match=r"source empty: no texts in empty.csv"):
        read_texts("empty.csv", tmp_path)


def test_errors_name_how_to_install_nltk_and_its_data(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the check before a model is loaded, and from the source itself."""

    def without_data(text: str) -> list[str]:
        raise LookupError("Resource punkt_tab not found.")

    source = Files(path=str(book / "book.txt"), splitter="nltk")
    tokenize = types.ModuleType("nltk.tokenize")
    tokenize.sent_tokenize = without_data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.tokenize", tokenize)
    assert source.missing(None) == (
        "splitter 'nltk' needs its data: python -m nltk.downloader punkt_tab."
    )
    with pytest.raises(MemvecError, match="downloader punkt_tab"):
        list(source.passages(reader(), 1, 4))
    tokenize.sent_tokenize = lambda text: ["a b c d e f g h. ", text]  # type: ignore[attr-defined]
    assert source.missing(None) is None
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    assert source.missing(None) == "splitter 'nltk' needs nltk: pip install nltk."
    assert Files(path=str(book / "book.txt")).missing(None) is None


def test_with_bos_the_first_token_is_the_bos_that_the_tokenizer_adds(
    book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BOS counts as a token of the passage. Settings without it are those of earlier stores."""
    text = HEAD + '[[runs]]\nprotocol = "exact"\nsources = ["book"]\nlengths = [5]\n'
    plain, headed = (
        expand(parse_spec(text.replace('kind = "files"\n', f'kind = "files"\n{more}'), "spec"))[0]
        for more in ("", "bos = true\n")
    )
    assert "bos" not in plain.cell.source_settings
    assert headed.cell.source_settings["bos"] is True
    source = Files(path=str(book / "book.txt"), chunk_words=(40, 80), bos=True)
    lm = copy(reader())
    for adds in (False, True):
        monkeypatch.setattr(type(lm), "adds_bos", property(lambda _, adds=adds: adds))
        (found,) = find_passages(lm, headed.cell, source, 1, None)
        (without,) = source.passages(lm, 1, 5 - adds)
        assert found.passage.ids == (*([lm.bos_id] if adds else []), *without.passage.ids)
        assert len(found.passage) == 5


def sourced(ids: tuple[int, ...], number: int = 0) -> SourcedPassage:
    return SourcedPassage(number, Passage(ids), "of a test")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "gave 0 passages of 2."),
        ([Passage((3, 4))], "gives Passage, not SourcedPassage."),
        ([sourced((3, 4)), sourced((4, 5))], "gives number 0 where number 1 is due"),
        ([sourced((3,) * 6)], "gives passage 0 with 6 tokens: from 1 to 5 were asked for."),
        ([sourced((3, 9999))], "gives passage 0 the token 9999: tokens of tiny-bytes are integers"),
        ([sourced((3, -1))], "gives passage 0 the token -1: tokens of tiny-bytes are integers"),
    ],
)
def test_a_source_that_gives_wrong_passages_is_refused(given, sentence) -> None:
    class Other(Source):
        def passages(self, lm, count, length, base=None):
            yield from given or ()
            if given:
                yield sourced((3, 4), 1)

    cell = expand(parse_spec(ONE_CELL, "spec"))[0].cell
    with pytest.raises(MemvecError, match=re.escape(f"source 'random-tokens' {sentence}")):
        find_passages(reader(), cell, Other(kind="other"), 2, None)


def test_an_endless_source_gives_the_requested_number_of_passages() -> None:
    class Endless(Source):
        def passages(self, lm, count, length, base=None):
            yield from (sourced((3, 4 + i), i) for i in itertools.count())

    cell = expand(parse_spec(ONE_CELL, "spec"))[0].cell
    drawn = find_passages(reader(), cell, Endless(kind="endless"), 2, None)
    assert [p.passage.ids for p in drawn] == [(3, 4), (3, 5)]


ONE_CELL = """
name = "one"
[[models]]
name = "tiny"
[[sources]]
kind = "random-tokens"
[[runs]]
protocol = "exact"
lengths = [5]
passages = 2
"""
