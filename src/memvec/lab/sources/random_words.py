"""Random words: drawn evenly from the 100,000 most frequent English words, joined by spaces.

The paper uses GloVe's vocabulary (`make_vocab.py`). The default here is wordfreq's list, which
comes with a package, and the record names it. A word file with one word per line (`words`) replaces
it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from memvec.errors import MemvecError
from memvec.lab.sources.base import Source, SourcedPassage, seeded_random
from memvec.lab.sources.text_readers import read_utf8, resolve
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

WORDS = 100_000


class RandomWords(Source):
    """Words drawn evenly from a list of frequent ones."""

    random_text: ClassVar[bool] = True
    kind: Literal["random-words"] = "random-words"
    words: str | None = Field(default=None, description="word file; default: wordfreq's 100,000")
    drawn_lengths: bool = Field(
        default=False,
        strict=True,
        description="each length uniform in [2, length], as in the paper",
    )

    def missing(self, base: Path | None) -> str | None:
        try:
            self._list(base)
        except MemvecError as error:
            return str(error)
        return None

    def settings(self, base: Path | None = None) -> dict[str, Any]:
        return {**super().settings(base), "list": list_name(self._list(base), self.words)}

    def _list(self, base: Path | None) -> tuple[str, ...]:
        return read_words(self.words, base) if self.words else frequent_words()

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        yield from random_word_passages(
            lm, self._list(base), count, length, seed=self.seed, drawn_lengths=self.drawn_lengths
        )


def random_word_passages(
    lm: FrozenLM,
    words: tuple[str, ...],
    count: int,
    length: int,
    *,
    seed: int,
    drawn_lengths: bool = False,
) -> Iterator[SourcedPassage]:
    """`count` passages of random words, `length` tokens each.

    `drawn_lengths`: each passage's own length is uniform in [2, length], as in the paper; 1 for 1.
    """
    name = list_name(words, None)
    for number in range(count):
        draw = seeded_random("random-words", name, seed, number)
        tokens = length
        if drawn_lengths:
            tokens = seeded_random("length", seed, number, length).randint(min(2, length), length)
        ids: list[int] = []
        drawn: list[str] = []
        # Further words may merge with the last tokens, so these are not used.
        while len(ids) < tokens + 8:
            drawn += [draw.choice(words) for _ in range(length + 8)]
            ids = lm.tokenize(" ".join(drawn))
        passage = Passage(tuple(ids[:tokens]), number)
        yield SourcedPassage(number, passage, f"random words #{number}")


@functools.cache
def frequent_words() -> tuple[str, ...]:
    """wordfreq's most frequent English words. Raises MemvecError if wordfreq is not installed."""
    try:
        from wordfreq import top_n_list
    except ImportError:
        raise MemvecError(
            "source 'random-words' needs a word file, or wordfreq: pip install '.[study]' in the "
            "repository."
        ) from None
    return tuple(top_n_list("en", WORDS))


def read_words(path: str, base: Path | None = None) -> tuple[str, ...]:
    """Words of a file, one per line. Raises MemvecError if it is missing, empty or not UTF-8."""
    file = resolve(path, base)
    if not file.is_file():
        raise MemvecError(f"source missing: there is no word file {file}.")
    words = tuple(line.strip() for line in read_utf8(file).splitlines() if line.strip())
    if not words:
        raise MemvecError(f"the word file {file} is empty.")
    return words


def list_name(words: tuple[str, ...], path: str | None) -> str:
    """A word list in a record: its origin, size and digest."""
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    return f"{path or 'wordfreq en'}, {len(words)} words, sha256 {digest}"
