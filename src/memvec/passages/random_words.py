"""Random words: drawn evenly from the 100,000 most frequent English words, joined by spaces.

The paper's list is GloVe's vocabulary (`make_vocab.py`); by default ours is wordfreq's, which any
machine has, and the record names it. A word file with one word per line (`words`) replaces it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memvec.errors import MemvecError
from memvec.passages.found import Found, rng
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

WORDS = 100_000


@functools.cache
def frequent_words() -> tuple[str, ...]:
    """wordfreq's most frequent English words."""
    try:
        from wordfreq import top_n_list
    except ImportError:
        raise MemvecError(
            "source 'random-words' needs wordfreq (pip install 'memvec[study]') or a word file."
        ) from None
    return tuple(top_n_list("en", WORDS))


def read_words(path: str, base: Path | None = None) -> tuple[str, ...]:
    """Words of a file, one per line."""
    file = Path(path).expanduser()
    file = file if file.is_absolute() or base is None else base / file
    if not file.is_file():
        raise MemvecError(f"source missing: there is no word file {file}.")
    words = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not words:
        raise MemvecError(f"the word file {file} is empty.")
    return words


def list_name(words: tuple[str, ...], path: str | None) -> str:
    """What a record says about a word list: its origin, size and digest."""
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    return f"{path or 'wordfreq en'}, {len(words)} words, sha256 {digest}"


def random_word_passages(
    lm: FrozenLM,
    words: tuple[str, ...],
    count: int,
    length: int,
    *,
    seed: int,
    drawn_lengths: bool = False,
) -> Iterator[Found]:
    """`count` passages of random words, `length` tokens each.

    `drawn_lengths`: each passage's own length is uniform in [2, length], as in the paper.
    """
    name = list_name(words, None)
    for number in range(count):
        draw = rng("random-words", name, seed, number)
        own = rng("length", seed, number, length).randint(2, length) if drawn_lengths else length
        ids: list[int] = []
        drawn: list[str] = []
        while len(ids) < own + 8:  # a longer text may merge its last tokens: keep clear of the end
            drawn += [draw.choice(words) for _ in range(length + 8)]
            ids = lm.tokenize(" ".join(drawn))
        yield Found(number, Passage(tuple(ids[:own]), number), f"random words #{number}")
