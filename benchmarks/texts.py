"""Passages for the benchmarks: running prose written for this project, or held-out novels."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from memvec.lab.sources.random_tokens import random_token_passages
from memvec.lab.sources.random_words import frequent_words, random_word_passages, read_words
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage

PROSE = Path(__file__).parent.parent / "examples" / "harbour.txt"


def passages_of(
    lm: FrozenLM, n: int, T: int, seed: int = 0, corpus: Path | None = None
) -> list[Passage]:
    """n different passages of T tokens, starting at random places of the text.

    The text is this project's own prose, which no model was trained on, or the held-out texts of a
    corpus as recipes/corpus.py has it: a parquet file with columns `text` and `split`.
    """
    draw = random.Random(seed)
    texts = [PROSE.read_text(encoding="utf-8")] if corpus is None else held_out(corpus)
    pieces = [lm.tokenize(_excerpt(draw.choice(texts), draw)) for _ in range(n if corpus else 1)]
    if corpus is not None:
        return [Passage(tuple(ids[:T]), i) for i, ids in enumerate(pieces)]
    places = draw.sample(range(len(pieces[0]) - T), n)
    return [Passage(tuple(pieces[0][at : at + T]), i) for i, at in enumerate(places)]


def held_out(corpus: Path) -> list[str]:
    """Texts of the split 'valid'; without that column, of a sixteenth of the names."""
    import pandas as pd

    frame = pd.read_parquet(corpus)
    if "split" in frame:
        return list(frame.loc[frame["split"] == "valid", "text"])
    names = frame.get("novel", frame.index)
    digests = [hashlib.sha256(str(name).encode()).digest()[0] for name in names]
    return list(frame.loc[[digest < 16 for digest in digests], "text"])


def _excerpt(text: str, draw: random.Random, characters: int = 20_000) -> str:
    """A span that begins with a word; the whole of a short text."""
    if len(text) <= characters:
        return text
    at = text.find(" ", draw.randrange(len(text) - characters))
    return text[at : at + characters]


def random_words(
    lm: FrozenLM, n: int, T: int, seed: int = 0, words: Path | None = None
) -> list[Passage]:
    """n passages of T tokens of words drawn evenly from the 100 000 most frequent.

    `words` is a file of them, one a line: the same list as a file gives the same passages.
    """
    drawn = frequent_words() if words is None else read_words(str(words))
    sourced = random_word_passages(lm, drawn, n, T, seed=seed)
    return [item.passage for item in sourced]


def random_tokens(lm: FrozenLM, n: int, T: int, seed: int = 0) -> list[Passage]:
    """n passages of T uniform tokens."""
    return [item.passage for item in random_token_passages(lm, n, T, seed=seed)]
