"""Source `sentences`: whole sentences of texts, each with all the sentences before it.

Other sources take passages of one length. Here `length` is the limit of a sentence. Longer ones are
cut (memvec.lab.sentences.cutting), and their parts only precede other sentences. The passages are
whole sentences with at least `before` others in front of them. They are drawn by the seed over all
texts, and no sentence is drawn twice.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from memvec.errors import MemvecError
from memvec.lab.sentences.cutting import cut_sentences, need_two
from memvec.lab.sources.base import Source, SourcedPassage, seeded_random
from memvec.lab.sources.text_readers import missing_texts, read_texts
from memvec.lab.sources.written import MAX_BEFORE
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class SentencePassage(SourcedPassage):
    """A sentence; `sizes` are the token counts of the sentences in front of it that `before` has
    whole."""

    sizes: tuple[int, ...] = ()


class Sentences(Source):
    """Whole sentences, with the sentences before them."""

    kind: Literal["sentences"] = "sentences"
    starts_alike: ClassVar[bool] = False  # another limit cuts other sentences

    path: str | None = Field(default=None, description="the texts: a file, or a folder of files")
    column: str = Field(default="text", description="column of a table that holds the text")
    where: dict[str, str] = Field(default={}, description="keep table rows with these values")
    before: int = Field(default=8, ge=1, description="sentences that stand before one, at least")
    min_tokens: int = Field(default=4, ge=1, description="tokens of a sentence, at least")

    def missing(self, base: Path | None) -> str | None:
        """A sentence if there is no such file, or nothing in it."""
        if self.path is None:
            return f"source '{self.name}' needs a path."
        return missing_texts(self.path, base)

    def passages(
        self, lm: FrozenLM, count: int, length: int, base: Path | None = None
    ) -> Iterator[SourcedPassage]:
        """`count` sentences of at most `length` tokens.

        Raises MemvecError for a text of one sentence, or if there are too few sentences.
        """
        if problem := self.missing(base):
            raise MemvecError(problem)
        texts = read_texts(str(self.path), base, self.column, self.where)
        cut = [cut_sentences(lm, text, length) for _, text in texts]
        for (name, _), parts in zip(texts, cut, strict=True):
            need_two(parts, name)
        places = [
            (document, i)
            for document, parts in enumerate(cut)
            for i in range(self.before, len(parts))
            if parts[i].whole and len(parts[i].ids) >= self.min_tokens
        ]
        seeded_random("sentences", self.seed).shuffle(places)
        distinct = {cut[document][i].ids: (document, i) for document, i in reversed(places)}
        drawn = list(reversed(distinct.items()))
        if count > len(drawn):
            raise MemvecError(
                f"source '{self.name}' has {len(drawn)} whole sentences of {self.min_tokens} to "
                f"{length} tokens after {self.before} others: lower passages from {count}, or "
                "give more text."
            )
        begins = [[0, *accumulate(len(s.ids) for s in parts)] for parts in cut]  # in tokens
        for number, (ids, (document, i)) in enumerate(drawn[:count]):
            parts, begin = cut[document], begins[document]
            # All that a model can read before, so that no measure of it is of less.
            kept = max(MAX_BEFORE, begin[i] - begin[i - self.before], lm.context or begin[i])
            first = bisect.bisect_left(begin, begin[i] - kept)  # the first that is kept whole
            before = [token for s in parts[max(0, first - 1) : i] for token in s.ids]
            yield SentencePassage(
                number,
                Passage(ids, document, begin[i]),
                f"{texts[document][0]}, sentence {i + 1}",
                tuple(before[-kept:]),
                tuple(len(s.ids) for s in parts[first:i]),
            )
