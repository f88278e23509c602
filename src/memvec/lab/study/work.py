"""Work: passages of one cell through the engine and the protocol's measurement, to rows.

The same function runs here and inside a Ray actor; it knows nothing of stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memvec.cramming.certify import Outcome
from memvec.cramming.engine import Engine, Progress, resolve_start_rule
from memvec.errors import MemvecError
from memvec.lab.protocols import PROTOCOLS
from memvec.lab.study.cells import Cell
from memvec.lab.study.row import Finished, Row
from memvec.passages.found import Found
from memvec.passages.passage import ids_hash
from memvec.passages.sources import Source

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


def find_passages(
    lm: FrozenLM, cell: Cell, source: Source, count: int, base: Path | None
) -> list[Found]:
    """The cell's passages: `count` of them, from its source."""
    start = resolve_start_rule(lm, cell.made_recipe())
    tokens = PROTOCOLS[cell.protocol].tokens(cell.length, cell.vectors, start)
    least = 1 + (start == "first-token")
    if tokens < least:
        raise MemvecError(f"a length of {cell.length} leaves nothing to cram: use at least 2.")
    most = None if lm.context is None else lm.context - cell.vectors - (start == "bos")
    if most is not None and tokens > most:
        raise MemvecError(
            f"impossible length: {tokens} tokens and {cell.vectors} vectors do not fit the "
            f"context of {lm.name} ({lm.context} tokens)."
        )
    found = list(source.passages(lm, count, tokens, base))
    if len(found) < count:
        raise MemvecError(f"source '{cell.source}' gave {len(found)} passages of {count}.")
    return found


def cram_cell(
    lm: FrozenLM,
    cell: Cell,
    passages: Sequence[Found],
    batch_size: int,
    *,
    worker: str = "local",
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Finished]:
    """Rows of a cell's passages, each as soon as it is certified."""
    recipe = cell.made_recipe()
    lm = lm.read_as(PROTOCOLS[cell.protocol].layout)
    engine = Engine(
        lm,
        recipe,
        vectors=cell.vectors,
        batch_size=batch_size,
        storage=cell.storage,
        fixed_shapes=cell.fixed_shapes,
        on_progress=on_progress,
    )
    by_hash: dict[str, list[Found]] = {}
    for found in passages:  # equal passages have equal rows but for their number
        by_hash.setdefault(ids_hash(found.passage.ids), []).append(found)
    for outcome in engine.run([group[0].passage for group in by_hash.values()]):
        for found in by_hash[ids_hash(outcome.passage.ids)]:
            yield _finished(lm, cell, engine, found, outcome, worker)


def _finished(
    lm: FrozenLM, cell: Cell, engine: Engine, found: Found, outcome: Outcome, worker: str
) -> Finished:
    start, vectors = engine.start_rule, outcome.vectors
    scores, m = outcome.scores, outcome.metrics
    assert scores is not None, "an outcome that comes from the engine has its scores"
    reached = scores.leading(m.horizon)
    row = Row(
        cell=cell.key,
        number=found.number,
        passage=ids_hash(found.passage.ids),
        tokens=m.tokens,
        predicted=m.predicted,
        status=outcome.status,
        exact=outcome.exact,
        horizon=m.horizon,
        accuracy=m.accuracy,
        margin=m.margin,
        margin_asked=outcome.margin_asked,
        lm_bits=m.lm_bits,
        mem_bits=m.mem_bits,
        information_gain=m.information_gain,
        token_gain=m.token_gain,
        lm_right=scores.lm_hits(),
        horizon_gain=reached.information_gain(),
        horizon_token_gain=reached.token_gain(),
        steps=outcome.steps,
        spent=outcome.spent,
        seconds=outcome.seconds,
        start_rule=start,
        batch_size=engine.batch_size,
        worker=worker,
        extra=PROTOCOLS[cell.protocol].extra(lm, found, vectors, start, cell.options),
    )
    return Finished(row, vectors, scores.stacked()).to_plain()
