"""Written texts: the paper's chunks and its suffix rule, seeded; base of `files` and `hub`.

Kuratov et al. draw a book, split it into sentences, take a random span of 12,000 to 25,000 words
(`preprocess_pg19.ipynb`), and cram the first T tokens of the *second half* of the span's sentences
(`train.py`). Their draw was not seeded. Here the chunk's number seeds it, so that chunk i does not
depend on the number of chunks; one whose passage begins where that of an earlier one does is drawn
again. Sentences are split by punctuation here and by nltk's `punkt` there;
`splitter='nltk'` follows the paper exactly, where nltk and its data are installed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from memvec.errors import MemvecError
from memvec.lab.sources.base import Source, SourcedPassage, seeded_random
from memvec.lab.sources.text_readers import (
    NamedText,
    missing_texts,
    read_hub_texts,
    read_texts,
)
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

Splitter = Literal["punctuation", "nltk"]
Rule = Literal["suffix", "start"]

PAPER_WORDS = (12_000, 25_000)
MIN_SENTENCES = 10  # of a chunk, as in the paper
MAX_BEFORE = 4096  # tokens kept of the text before a passage
CACHED_TEXTS = 64  # whose words and sentences are kept for the other cells of a study
ATTEMPTS = 100  # draws of a chunk whose passage is not that of an earlier one
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


class WrittenTexts(Source):
    """Texts of a file, folder or data set, and the rule that takes a passage from each."""

    path: str | None = Field(default=None, description="file, folder or - for standard input")
    dataset: str | None = Field(
        default=None, description="Hub data set, if there is no path; pg19, fanfics: the paper's"
    )
    split: str = Field(default="train", description="split of the Hub data set")
    revision: str | None = Field(default=None, description="revision of the Hub data set")
    column: str = Field(default="text", description="column of a table that holds the text")
    where: dict[str, str] = Field(default={}, description="keep table rows with these values")
    rule: Rule = Field(
        default="suffix",
        description="'suffix': the paper's, second half of the sentences; 'start': from the start",
    )
    chunk_words: tuple[int, int] | None = Field(
        default=None,
        description="draw chunks of [fewest, most] words; default: each text is a chunk",
    )
    splitter: Splitter = Field(default="punctuation", description="how sentences are split")

    def missing(self, base: Path | None) -> str | None:
        min_words, max_words = self.chunk_words or (1, 1)
        if not 1 <= min_words <= max_words:
            return (
                f"source '{self.name}': chunk_words are [fewest, most], not "
                f"[{min_words}, {max_words}]."
            )
        if self.rule == "suffix" or self.chunk_words is not None:
            try:
                sentences("One. Two.", self.splitter)
            except MemvecError as error:  # nltk or its data
                return str(error)
        if self.where and self.path == "-":
            return f"source '{self.name}': where is for tables, and standard input is a text."
        if self.path in (None, "-"):
            needed = "a path" if self.kind == "files" else "a dataset, or a path"
            return None if self.path or self.dataset else f"source '{self.name}' needs {needed}."
        return missing_texts(str(self.path), base)

    def texts(self, base: Path | None) -> list[NamedText]:
        """(name, text) of the texts that passages are taken from.

        Raises MemvecError for a source without path and dataset, or texts that cannot be read.
        """
        if self.path is not None:
            return read_texts(self.path, base, self.column, self.where)
        if self.dataset is None:
            raise MemvecError(f"source '{self.name}' needs a path or a dataset.")
        return read_hub_texts(self.dataset, self.split, self.column, self.revision, self.where)

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        """`count` passages of `length` tokens; passage i at a shorter length is its beginning.

        Raises MemvecError if there are too few texts or one is too short.
        """
        texts = self.texts(base)
        if problem := self._too_few(count, texts):
            raise MemvecError(problem)
        taken: set[tuple[str, int]] = set()
        for number in range(count):
            if self.chunk_words is None:
                name, text = texts[number]
            else:
                name, text = self._chunk(texts, number, self.chunk_words, taken)
            before, passage_text = split_by_rule(text, self.rule, self.splitter)
            ids = _leading_ids(lm, passage_text, length)
            if len(ids) < length:
                more = "raise chunk_words" if self.chunk_words else "take longer texts"
                raise MemvecError(
                    f"source '{self.name}': {name} has {len(ids)} tokens for a passage of "
                    f"{length}: lower lengths, or {more}."
                )
            passage = Passage(tuple(ids[:length]), number)
            yield SourcedPassage(number, passage, name, _ids_before(lm, before))

    def too_few(self, count: int, base: Path | None) -> str | None:
        if self.path in (None, "-") or self.chunk_words is not None:
            return None  # a data set of the Hub, or text that can be read once
        try:
            return self._too_few(count, self.texts(base))
        except MemvecError as error:
            return str(error)

    def _too_few(self, count: int, texts: Sequence[NamedText]) -> str | None:
        """A sentence if each text gives one passage and there are fewer texts than `count`."""
        if self.chunk_words is not None or count <= len(texts):
            return None
        return (
            f"{count} passages were asked of source '{self.name}', which has "
            f"{len(texts)} text{'' if len(texts) == 1 else 's'}: lower passages, or draw chunks "
            "with chunk_words."
        )

    def _chunk(
        self,
        texts: Sequence[NamedText],
        number: int,
        words: tuple[int, int],
        taken: set[tuple[str, int]],
    ) -> NamedText:
        """Chunk `number`, whose passage begins at none of the `taken` sentences; it is added."""
        for attempt in range(ATTEMPTS):
            drawn = chunk(
                texts, number, words, seed=self.seed, splitter=self.splitter, attempt=attempt
            )
            middle = drawn.sentences // 2 if self.rule == "suffix" else 0
            place = (drawn.text_name, drawn.first + middle)
            if place not in taken:
                taken.add(place)
                return f"{drawn.text_name} #{number}", drawn.text
        raise MemvecError(
            f"source '{self.name}' has texts for {number} different chunks of {words[0]} to "
            f"{words[1]} words, and more passages were asked: lower passages, or chunk_words."
        )


class Chunk(NamedTuple):
    """A span of so many sentences of a text, from number `first` on."""

    text_name: str
    first: int
    sentences: int
    text: str


def sentences(text: str, splitter: Splitter = "punctuation") -> list[str]:
    """Sentences of a text, in order. Raises MemvecError if nltk is asked for and not installed."""
    if splitter == "nltk":
        try:
            from nltk.tokenize import sent_tokenize
        except ImportError:
            raise MemvecError("splitter 'nltk' needs nltk: pip install nltk.") from None
        try:
            return list(sent_tokenize(text))
        except LookupError:
            raise MemvecError(
                "splitter 'nltk' needs its data: python -m nltk.downloader punkt_tab."
            ) from None
    parts, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        parts.append(text[start : match.end()].strip())
        start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def chunk(
    texts: Sequence[NamedText],
    number: int,
    words: tuple[int, int] = PAPER_WORDS,
    *,
    seed: int = 0,
    splitter: Splitter = "punctuation",
    attempt: int = 0,
) -> Chunk:
    """Chunk `number` of a set of (name, text): a random text with enough words, a random span.

    `words`: smallest and largest number of words; another `attempt` draws another chunk. Raises
    MemvecError if no text is long enough.
    """
    min_words, max_words = words
    usable = [(name, text) for name, text in texts if _count_words(text) >= min_words]
    if not usable:
        longest = max((_count_words(text) for _, text in texts), default=0)
        raise MemvecError(
            f"no text has the {min_words} words of a chunk (the longest has {longest}): "
            "lower chunk_words."
        )
    draw = seeded_random("chunk", seed, number, *([attempt] if attempt else []))
    name, text = draw.choice(usable)
    parts = _sentences_of_words(text, splitter)
    sizes = [len(part.split()) for part in parts]
    wanted = draw.randint(min_words, max_words)
    start = draw.randrange(len(parts))
    # Walk back when the text ends too early, so that every chunk has its words.
    while start > 0 and sum(sizes[start:]) < wanted:
        start -= 1
    end, total = start, 0
    while end < len(parts) and (total < wanted or end - start < MIN_SENTENCES):
        total += sizes[end]
        end += 1
    return Chunk(name, start, end - start, " ".join(parts[start:end]))


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _count_words(text: str) -> int:
    return len(text.split())


@functools.lru_cache(maxsize=CACHED_TEXTS)
def _sentences_of_words(text: str, splitter: Splitter) -> tuple[str, ...]:
    """Sentences of the text with single spaces between its words."""
    return tuple(sentences(" ".join(text.split()), splitter))


def split_by_rule(text: str, rule: Rule, splitter: Splitter = "punctuation") -> tuple[str, str]:
    """(the text before the passage, the text whose first T tokens are the passage).

    Raises MemvecError as `sentences`.
    """
    if rule == "start":
        return "", text
    parts = sentences(text, splitter)
    middle = len(parts) // 2
    return " ".join(parts[:middle]), " ".join(parts[middle:])


def _leading_ids(lm: FrozenLM, text: str, length: int) -> list[int]:
    """At least the first `length` token ids of a text, if it has so many."""
    # Enough characters for any tokenizer's T tokens; whole chunks are 100 times longer.
    ids = lm.tokenize(text[: 16 * length + 64])
    return ids if len(ids) >= length + 8 else lm.tokenize(text)


def _ids_before(lm: FrozenLM, before: str) -> tuple[int, ...]:
    """The last MAX_BEFORE token ids of the text before a passage, with the space after it.

    The space is often a token of its own. So it is in the published context ablation, which joins
    token ids rather than texts: the passage must keep the tokens that it was crammed with.
    """
    if not before:
        return ()
    return tuple(lm.tokenize(before[-16 * MAX_BEFORE :] + " ")[-MAX_BEFORE:])
