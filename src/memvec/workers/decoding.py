"""The decoding that certifies a result, divided among the workers that crammed it.

Each worker decodes whole batches, with the same passages in the same rows as
`MemVectors.decode_passages` has them. The token ids are therefore those of a single process, and
the time is divided by the number of workers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from memvec.decoding import BATCH
from memvec.model.lm import FrozenLM
from memvec.vectors import MemVectors
from memvec.workers.actor import OnProgress
from memvec.workers.pool import Workers

UNITS = 4  # per worker: several, so that all workers finish at about the same time


@dataclass(frozen=True)
class Decoding:
    """A unit of passages of a result, from number `first` on, for one worker to decode."""

    mem: MemVectors
    first: int
    done: frozenset[Hashable] = field(default_factory=frozenset)

    def keys(self) -> set[Hashable]:
        """The number of the first passage of each batch that is not done."""
        numbers = range(self.first, self.first + len(self.mem.passages), BATCH)
        return {number for number in numbers if number not in self.done}

    def without(self, done: set[Hashable]) -> Decoding:
        """The unit without the batches of these keys."""
        return replace(self, done=self.done | done)

    def work(
        self, lm: FrozenLM, worker: str, on_progress: OnProgress
    ) -> Iterator[tuple[Hashable, tuple[int, list[list[int]]]]]:
        """Yields (key, (key, token ids of its passages)) for each batch."""
        for at in range(0, len(self.mem.passages), BATCH):
            number = self.first + at
            if number not in self.done:
                part = passages_of(self.mem, at, at + BATCH)
                yield number, (number, part.decode_passages(lm))


def passages_of(mem: MemVectors, first: int, end: int) -> MemVectors:
    """Some passages of a result, copied, since Ray would send all vectors behind a view."""
    header = mem.header.model_copy(update={"passages": mem.passages[first:end]})
    return MemVectors(mem.vectors[first:end].clone(), header, mem.soft)


def decode_passages(lm: FrozenLM, mem: MemVectors, workers: Workers | None) -> list[list[int]]:
    """Token ids of every passage, from free-running decoding on the workers or in this process.

    This process decodes without workers, for passages that share a vector, and if the workers use
    another kind of device than `lm`, because the certificate names the device.
    """
    device_type = "cuda" if workers is not None and workers.gpu else "cpu"
    if workers is None or lm.device.type != device_type or lm.reading.crammer:
        return mem.decode_passages(lm)
    P = len(mem.passages)
    size = BATCH * -(-P // (BATCH * UNITS * workers.count))  # whole batches
    units = (Decoding(passages_of(mem, at, at + size), at) for at in range(0, P, size))
    decoded = dict(workers.stream(lambda: next(units, None), None))
    return [ids for number in sorted(decoded) for ids in decoded[number]]
