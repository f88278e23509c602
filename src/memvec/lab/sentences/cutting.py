"""A text as sentences of at most so many tokens, and where a decoded sentence ends.

Sentences end by the rule of `memvec.lab.sources.written.sentences`: a full stop, a question mark or
an exclamation mark, and after it white space and a capital or a digit. White space in a text is
one space, and a sentence begins with the space in front of it, so that the tokens of a text are
those of its sentences one after the other. A sentence longer than the limit is cut into parts of
equal length. Each part counts as a sentence and is marked as a part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memvec.errors import MemvecError, check_minimum
from memvec.lab.sources.written import sentences

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

NEXT = " The"  # appended to a text to test whether a sentence ends before it


@dataclass(frozen=True)
class Sentence:
    """Token ids of a sentence; `whole` is False for a part of one longer than the limit."""

    ids: tuple[int, ...]
    whole: bool = True


def cut_sentences(
    lm: FrozenLM, text: str, max_tokens: int, count: int | None = None
) -> list[Sentence]:
    """The sentences of a text, in order, each of at most `max_tokens` tokens; the first `count`.

    Longer sentences are cut into parts of nearly one length. None for a text without words. Raises
    MemvecError for `max_tokens` below 1.
    """
    check_minimum(1, max_tokens=max_tokens)
    cut: list[Sentence] = []
    for sentence in sentences(" ".join(text.split())):
        if count is not None and len(cut) >= count:
            break
        ids = lm.tokenize(" " + sentence)
        parts = -(-len(ids) // max_tokens)
        bounds = [round(i * len(ids) / parts) for i in range(parts + 1)] if parts else [0]
        cut += [
            Sentence(tuple(ids[start:end]), whole=parts == 1)
            for start, end in itertools.pairwise(bounds)
        ]
    return cut[:count]


def need_two(cut: Sequence[Sentence], name: str) -> None:
    """Raise MemvecError for a text of one sentence, which has no earlier one to predict it from."""
    if len(cut) < 2:
        raise MemvecError(
            f"{name} has {len(cut)} sentence(s) and nothing to predict one from: give a text of "
            "at least two."
        )


def share_cut(cut: Sequence[Sentence]) -> float:
    """Share of sentences that are parts of longer ones; 0 of none."""
    return sum(not s.whole for s in cut) / max(len(cut), 1)


def first_sentence(lm: FrozenLM, ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens (at least one) up to the first end of a sentence in generated token ids.

    If no sentence ends, these are all tokens. An end counts only when the next token begins a word,
    so that a closing quotation mark stays with its sentence.
    """
    for n in range(1, len(ids)):
        text = lm.text(ids[:n])
        follows = lm.text([ids[n]])
        begins = follows[:1].isspace() or not follows.strip()
        if begins and text.strip() and len(sentences(text.strip() + NEXT)) > 1:
            return tuple(ids[:n])
    return tuple(ids)


def last_sentences(text: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The last sentences of a text of token ids, split by their token counts.

    Raises MemvecError if the text has fewer tokens.
    """
    sentences, end = [], len(text)
    for size in reversed(sizes):
        sentences.append(tuple(text[end - size : end]))
        end -= size
    if end < 0:
        raise MemvecError(
            f"the sentences of the context have {sum(sizes)} tokens and the source keeps "
            f"{len(text)} of the text before: lower the context."
        )
    return sentences[::-1]
