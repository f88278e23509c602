"""From natural texts to passages: chunk (or not), take the part the rule says, tokenize, cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memvec.errors import MemvecError
from memvec.passages.chunks import Rule, Splitter, chunk, split_by_rule
from memvec.passages.found import Found
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

MOST_BEFORE = 4096  # tokens of context kept in front of a passage


def natural_passages(
    lm: FrozenLM,
    texts: Sequence[tuple[str, str]],
    count: int,
    length: int,
    *,
    rule: Rule,
    words: tuple[int, int] | None,
    seed: int,
    splitter: Splitter = "punctuation",
) -> Iterator[Found]:
    """`count` passages of `length` tokens; passage i at a shorter length is its beginning.

    `words` draws chunks of that many words from the texts; None takes text i as chunk i.
    Raises MemvecError if there are too few texts or one is too short.
    """
    if words is None and count > len(texts):
        raise MemvecError(
            f"{count} passages were asked of a source with {len(texts)} texts: lower passages, "
            "or draw chunks with chunk_words."
        )
    for number in range(count):
        name, text = texts[number] if words is None else chunk(texts, number, words, seed, splitter)
        before, rest = split_by_rule(text, rule, splitter)
        # Enough characters for any tokenizer's T tokens; whole chunks are 100 times longer.
        ids = lm.tokenize(rest[: 16 * length + 64])
        ids = ids if len(ids) >= length + 8 else lm.tokenize(rest)
        if len(ids) < length:
            raise MemvecError(
                f"{name} has {len(ids)} tokens for a passage of {length}: lower lengths, or raise "
                "chunk_words."
            )
        context = lm.tokenize(before[-16 * MOST_BEFORE :] + " ")[-MOST_BEFORE:] if before else []
        yield Found(number, Passage(tuple(ids[:length]), number), name, tuple(context))
