"""The paper's chunks and its suffix rule, seeded.

Kuratov et al. draw a book, split it into sentences, take a random span of 12,000 to 25,000 words
(`preprocess_pg19.ipynb`), and cram the first T tokens of the *second half* of the span's sentences
(`train.py`). Their draw was not seeded; ours is, by the chunk's number, so chunk i is the same
however many are made. Sentences are split by punctuation here and by nltk's `punkt` there; give
`splitter='nltk'` where nltk and its data are installed, to follow the paper to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from memvec.errors import MemvecError
from memvec.passages.found import rng

Splitter = Literal["punctuation", "nltk"]
Rule = Literal["suffix", "start"]

PAPER_WORDS = (12_000, 25_000)
LEAST_SENTENCES = 10  # of a chunk, as in the paper
_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def sentences(text: str, splitter: Splitter = "punctuation") -> list[str]:
    """Sentences of a text, in order."""
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
    found, at = [], 0
    for match in _END.finditer(text):
        found.append(text[at : match.end()].strip())
        at = match.end()
    return [s for s in [*found, text[at:].strip()] if s]


def chunk(
    texts: Sequence[tuple[str, str]],
    number: int,
    words: tuple[int, int] = PAPER_WORDS,
    seed: int = 0,
    splitter: Splitter = "punctuation",
) -> tuple[str, str]:
    """Chunk `number` of a set of (name, text): a random text with enough words, a random span.

    Raises MemvecError if no text is long enough.
    """
    least, most = words
    usable = [(name, text) for name, text in texts if len(text.split()) >= least]
    if not usable:
        longest = max((len(text.split()) for _, text in texts), default=0)
        raise MemvecError(
            f"no text has the {least} words of a chunk (the longest has {longest}): "
            "lower chunk_words."
        )
    draw = rng("chunk", seed, number)
    name, text = draw.choice(usable)
    parts = sentences(" ".join(text.split()), splitter)
    sizes = [len(part.split()) for part in parts]
    wanted = draw.randint(least, most)
    start = draw.randrange(len(parts))
    # Walk back when the text ends too early, so that every chunk has its words.
    while start > 0 and sum(sizes[start:]) < wanted:
        start -= 1
    end, total = start, 0
    while end < len(parts) and (total < wanted or end - start < LEAST_SENTENCES):
        total += sizes[end]
        end += 1
    return f"{name} #{number}", " ".join(parts[start:end])


def split_by_rule(text: str, rule: Rule, splitter: Splitter = "punctuation") -> tuple[str, str]:
    """(what stands before the passage, the text whose first T tokens are the passage)."""
    if rule == "start":
        return "", text
    parts = sentences(text, splitter)
    middle = len(parts) // 2
    return " ".join(parts[:middle]), " ".join(parts[middle:])
