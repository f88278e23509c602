"""Passages for the benchmarks: prose of this project, held-out texts, random words or tokens."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memvec.errors import MemvecError
from memvec.lab.sources.random_tokens import random_token_passages
from memvec.lab.sources.random_words import frequent_words, random_word_passages, read_words
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage

PROSE = Path(__file__).parent.parent / "examples" / "harbour.txt"
EXCERPT = 20_000  # characters of a text that are tokenized to take a passage from them
ATTEMPTS = 100  # how often a passage that overlaps another one is drawn again


def passages_of(
    lm: FrozenLM, n: int, T: int, seed: int = 0, corpus: Path | None = None
) -> list[Passage]:
    """n different passages of T tokens, starting at random places of the text.

    The text is this project's own prose, which no model was trained on, or the held-out texts of a
    corpus as recipes/corpus.py reads it: a parquet file with columns `text` and `split`. Passages
    share no token, unless the prose is too short; then stderr says how many overlap, and
    `overlapping` counts them. What is drawn depends on n, T and seed only. For a model without a
    tokenizer the passages are random tokens.
    """
    if lm.tokenizer is None:
        return random_tokens(lm, n, T, seed)
    draw = random.Random(seed)
    if corpus is not None:
        pieces = _of_corpus(lm, n, T, draw, corpus)
        return [Passage(ids[:T], i) for i, (_, _, ids) in enumerate(pieces)]
    # A choice of one text: it uses a random number, so that seeds give the same passages as before.
    text = draw.choice([PROSE.read_text(encoding="utf-8")])
    ids = lm.tokenize(_excerpt(text, draw)[1])
    passages = [
        Passage(tuple(ids[at : at + T]), i, at) for i, at in enumerate(places(len(ids), n, T, draw))
    ]
    if shared := overlapping(passages):
        print(
            f"{PROSE.name} has {len(ids)} tokens: {shared} of {n} passages of {T} tokens overlap, "
            "so intervals over passages are too narrow",
            file=sys.stderr,
        )
    return passages


def overlapping(passages: Sequence[Passage]) -> int:
    """How many passages share tokens of the prose with another one."""

    def share(a: Passage, b: Passage) -> bool:
        distance = b.offset - a.offset
        return 0 <= distance < len(a) and a.ids[distance:] == b.ids[: len(a) - distance]

    return sum(any(share(a, b) or share(b, a) for b in passages if b is not a) for a in passages)


def places(N: int, n: int, T: int, draw: random.Random) -> list[int]:
    """First tokens of n passages in a text of N tokens, at least T apart if n T tokens fit.

    Only places that are too close to an earlier one are drawn again.
    """
    if T > N or n > max(1, N - T):
        raise MemvecError(
            f"{PROSE.name} has {N} tokens, too few for {n} different passages of {T}: "
            "ask for fewer or shorter ones."
        )
    first_draw = draw.sample(range(max(1, N - T)), n)
    if n * T > N:
        return first_draw
    free = np.ones(N - T + 1, dtype=bool)
    chosen: dict[int, int] = {}

    def take(i: int, at: int) -> None:
        chosen[i] = at
        free[max(0, at - T + 1) : at + T] = False

    for i, at in enumerate(first_draw):
        if free[at]:
            take(i, at)
    for i in sorted(set(range(n)) - chosen.keys()):
        if not free.any():  # the gaps are too small: spread all passages over the text instead
            before = sorted(draw.choices(range(N - n * T + 1), k=n))
            spread = [gap + j * T for j, gap in enumerate(before)]
            return draw.sample(spread, n)
        take(i, int(draw.choice(np.flatnonzero(free))))
    return [chosen[i] for i in range(n)]


Piece = tuple[int, int, tuple[int, ...]]  # number of the text, first character, its token ids


def _of_corpus(lm: FrozenLM, n: int, T: int, draw: random.Random, corpus: Path) -> list[Piece]:
    """n pieces of at least T tokens; those whose first T overlap an earlier one are drawn again."""
    texts = held_out(corpus)
    if not texts:
        raise MemvecError(f"--corpus {corpus}: no text is held out; give more texts.")
    accepted: dict[int, Piece] = {}

    def fits(piece: Piece) -> bool:
        index, at, ids = piece
        end = at + len(lm.text(list(ids[:T])))
        return len(ids) >= T and not any(
            index == other
            and at < other_begin + len(lm.text(list(other_ids[:T])))
            and other_begin < end
            for other, other_begin, other_ids in accepted.values()
        )

    def piece(characters: int) -> Piece:
        index = draw.choice(range(len(texts)))
        at, text = _excerpt(texts[index], draw, characters)
        return index, at, tuple(lm.tokenize(text))

    first_draws = [piece(EXCERPT) for _ in range(n)]
    for i, drawn in enumerate(first_draws):
        if fits(drawn):
            accepted[i] = drawn
    for i in sorted(set(range(n)) - accepted.keys()):
        # A passage may now begin at any place of a text, so that texts shorter than EXCERPT, which
        # are always read from their beginning above, give more than one passage.
        redrawn = (piece(0) for _ in range(ATTEMPTS))
        fitting = next((drawn for drawn in redrawn if fits(drawn)), None)
        if fitting is None:
            raise MemvecError(
                f"--corpus {corpus}: found only {len(accepted)} of {n} passages of {T} held-out "
                "tokens that do not overlap; ask for fewer or shorter ones, or give more texts."
            )
        accepted[i] = fitting
    return [accepted[i] for i in range(n)]


def held_out(corpus: Path) -> list[str]:
    """Texts of the split 'valid'; without that column, one text in 16 by a hash of its name.

    Raises MemvecError if the file cannot be read or has no column `text`.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(corpus)
    except (OSError, ValueError) as error:
        raise MemvecError(f"--corpus {corpus} is not a parquet file of texts: {error}") from None
    if "text" not in frame:
        raise MemvecError(f"--corpus {corpus}: no column 'text'; it has {list(frame.columns)}.")
    if "split" in frame:
        return list(frame.loc[frame["split"] == "valid", "text"])
    names = frame.get("novel", frame.index)
    digests = [hashlib.sha256(str(name).encode()).digest()[0] for name in names]
    return list(frame.loc[[digest < 16 for digest in digests], "text"])


def _excerpt(text: str, draw: random.Random, least: int = EXCERPT) -> tuple[int, str]:
    """(first character, text) of a span that begins between words and has EXCERPT characters.

    At least `least` characters of the text follow its beginning. A text that is no longer than
    that is returned whole.
    """
    if len(text) <= least:
        return 0, text
    at = max(0, text.find(" ", draw.randrange(len(text) - least)))
    return at, text[at : at + EXCERPT]


def random_words(lm: FrozenLM, n: int, T: int, words: Path | None = None) -> list[Passage]:
    """n passages of T tokens; their words are drawn uniformly from the 100,000 most frequent.

    `words` is a file with one word a line, which replaces this list.
    """
    drawn = frequent_words() if words is None else read_words(str(words))
    return [item.passage for item in random_word_passages(lm, drawn, n, T, seed=0)]


def random_tokens(lm: FrozenLM, n: int, T: int, seed: int = 0) -> list[Passage]:
    """n passages of T uniform tokens."""
    return [item.passage for item in random_token_passages(lm, n, T, seed=seed)]
