"""The lengths of a long document's passages, found by workers.

The length of a passage depends on its start alone. A cut that begins at some place of a document
therefore soon has a start in common with the cut from the document's beginning, and is the same
from there. So each worker cuts a part of the document, and the driver, which cuts it from the
beginning, looks up all lengths but those of a few passages at the beginning of each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.passages.cutting import Cutter
from memvec.passages.documents import Document
from memvec.workers.actor import OnProgress
from memvec.workers.pool import Workers

PART = 4096  # minimum number of tokens of a part
SECTION = 256  # tokens; a part is cut section by section

Lengths = dict[tuple[int, int], int]


@dataclass(frozen=True)
class Cutting:
    """A unit: a part of a document, from token `first` to `end`, for one worker to cut.

    `ids` has the tokens from `first` on, also those after `end` that a passage may need. `bits`,
    `max_tokens` and `min_tokens` are those of `Cutter`.
    """

    document: int
    ids: tuple[int, ...]
    first: int
    end: int
    bits: float
    max_tokens: int
    min_tokens: int

    def keys(self) -> set[Hashable]:
        """(document, first token) of each section."""
        return {(self.document, first) for first in range(self.first, self.end, SECTION)}

    def without(self, done: set[Hashable]) -> Cutting:
        """The unit without the sections of these keys, which are its first ones."""
        first = self.first + SECTION * len(self.keys() & done)
        return replace(self, ids=self.ids[first - self.first :], first=first)

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, Lengths]]:
        """Yields (key, lengths) of each section: (document, start) -> tokens of the passage."""
        limits = {"max_tokens": self.max_tokens, "min_tokens": self.min_tokens}
        passages = Cutter(lm, bits=self.bits, **limits).cut(self.ids)
        start, lengths = self.first, Lengths()
        for first in range(self.first, self.end, SECTION):
            while start < min(first + SECTION, self.end):
                lengths[self.document, start] = n = len(next(passages))
                start += n
            yield (self.document, first), lengths
            lengths = Lengths()


def cut_lengths(
    workers: Workers | None,
    cutter: Cutter,
    documents: Sequence[Document],
    on_share: Callable[[float], None],
) -> Lengths:
    """Lengths of passages, (document, start) -> tokens, for `Cutter.known`.

    There are none without workers, if nothing has to be cut by bits, or if the documents are too
    short to be divided. `on_share` is called with the share of the tokens that has been cut. Raises
    MemvecError for anything but Workers, if they have another model than the cutter, and as
    `Workers.stream` does.
    """
    known = Lengths()
    if workers is None:
        return known
    if not isinstance(workers, Workers):
        raise MemvecError(
            "workers are memvec.workers.Workers, as Workers(Loading(NAME), workers=2) gives, "
            f"not {workers!r}."
        )
    workers.check_model(cutter.lm)
    if cutter.bits is None or math.isinf(cutter.bits):
        return known
    parts = list(_parts(workers.count, documents))
    if len(parts) > 1:
        read, total = 0, sum(len(document.ids) for document in documents)
        units = (_unit(cutter, documents, part) for part in parts)
        for lengths in workers.stream(lambda: next(units, None), None):
            known |= lengths
            read += sum(lengths.values())
            on_share(min(1.0, read / total))
    return known


def _parts(count: int, documents: Sequence[Document]) -> Iterator[tuple[int, int, int]]:
    """(document, first token, end) of the parts: at most `count` of each document."""
    for i, document in enumerate(documents):
        size = max(PART, -(-len(document.ids) // count))
        for first in range(0, len(document.ids), size):
            yield i, first, min(first + size, len(document.ids))


def _unit(cutter: Cutter, documents: Sequence[Document], part: tuple[int, int, int]) -> Cutting:
    """A part as a unit, with the tokens that it needs."""
    assert cutter.bits is not None
    i, first, end = part
    ids = tuple(documents[i].ids[first : end + cutter.max_tokens + cutter.min_tokens])
    return Cutting(i, ids, first, end, cutter.bits, cutter.max_tokens, cutter.min_tokens)
