"""The decode that certifies a result, shared by the workers that crammed it.

Each decodes whole batches of passages, in the places and sizes that `decode_passages` has them in:
what comes out is what one process finds, in as many times less time as there are workers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from memvec.decoding import BATCH
from memvec.model.lm import FrozenLM
from memvec.vectors import MemVectors
from memvec.workers.actor import OnProgress
from memvec.workers.pool import Workers

UNITS = 4  # per worker: a few, so that all have some to the end


@dataclass(frozen=True)
class Decoding:
    """Passages of a result, from the one with number `first`, for one worker to decode."""

    mem: MemVectors
    first: int
    done: frozenset[Hashable] = field(default_factory=frozenset)

    def keys(self) -> set[Hashable]:
        """The number of the first passage of each batch."""
        numbers = range(self.first, self.first + len(self.mem.passages), BATCH)
        return {number for number in numbers if number not in self.done}

    def without(self, done: set[Hashable]) -> Decoding:
        """The unit without the batches of these keys."""
        return replace(self, done=self.done | done)

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, tuple[int, list[list[int]]]]]:
        """Yields each batch: its key, and its number with the token ids of its passages."""
        for at in range(0, len(self.mem.passages), BATCH):
            number = self.first + at
            if number not in self.done:
                part = passages_of(self.mem, at, at + BATCH)
                yield number, (number, part.decode_passages(lm))


def passages_of(mem: MemVectors, first: int, end: int) -> MemVectors:
    """Some passages of a result. Copied: a view would travel to a worker with all the others."""
    header = mem.header.model_copy(update={"passages": mem.passages[first:end]})
    return MemVectors(mem.vectors[first:end].clone(), header, mem.soft)


def decode_passages(lm: FrozenLM, mem: MemVectors, workers: Workers | None) -> list[list[int]]:
    """Token ids of every passage, decoded freely: by the workers, or here.

    Here, too, if the workers compute on other devices than `lm`, because the certificate says what
    it was decoded on; and for passages that share a vector.
    """
    device_type = "cuda" if workers is not None and workers.gpu else "cpu"
    if workers is None or lm.device.type != device_type or lm.reading.crammer:
        return mem.decode_passages(lm)
    P = len(mem.passages)
    size = BATCH * -(-P // (BATCH * UNITS * workers.count))  # whole batches
    units = (Decoding(passages_of(mem, at, at + size), at) for at in range(0, P, size))
    decoded = dict(workers.stream(lambda: next(units, None), None))
    return [ids for number in sorted(decoded) for ids in decoded[number]]
