"""The decoding of many passages, batch after batch, in this process or divided among workers.

Whole batches are decoded, with the same passages in the same rows as `MemVectors.decode_passages`
has them. The token ids are therefore the same, and on workers the time is divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
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
    force: bool = False  # as in `MemVectors.decode_passages`

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
                yield number, (number, part.decode_passages(lm, force=self.force))


def passages_of(mem: MemVectors, first: int, end: int) -> MemVectors:
    """Some passages of a result, copied, since Ray would send all vectors behind a view."""
    header = mem.header.model_copy(update={"passages": mem.passages[first:end]})
    return MemVectors(mem.vectors[first:end].clone(), header, mem.soft)


def decode_passages(
    lm: FrozenLM,
    mem: MemVectors,
    workers: Workers | None = None,
    *,
    force: bool = False,
    on_share: Callable[[float], None] | None = None,
) -> list[list[int]]:
    """Token ids of every passage, decoded freely; as `mem.decode_passages`, with progress.

    `on_share` is called after each batch with the share of the passages that is decoded. Workers
    decode, unless the passages share a vector, or their devices are of another kind than that of
    `lm`, which the certificate names. Raises MemvecError as `MemVectors.decode_passages` does.
    """
    mem.check_model(lm, force=force)
    decoded: dict[int, list[list[int]]] = {}
    for number, ids in _batches(lm, mem, workers, force):
        decoded[number] = ids
        if on_share is not None:
            on_share(sum(map(len, decoded.values())) / len(mem.passages))
    return [ids for number in sorted(decoded) for ids in decoded[number]]


def _batches(
    lm: FrozenLM, mem: MemVectors, workers: Workers | None, force: bool
) -> Iterator[tuple[int, list[list[int]]]]:
    """(number of the first passage, token ids) of each batch, as soon as it is decoded."""
    device_type = "cuda" if workers is not None and workers.gpu else "cpu"
    if workers is None or lm.device.type != device_type or lm.reading.shares_vector:
        yield from (batch for _, batch in Decoding(mem, 0, force=force).work(lm, "", None))
        return
    P = len(mem.passages)
    size = BATCH * -(-P // (BATCH * UNITS * workers.count))  # whole batches
    units = (Decoding(passages_of(mem, at, at + size), at, force=force) for at in range(0, P, size))
    yield from workers.stream(lambda: next(units, None), None)
