"""The work of a study: cram passages of one cell, measure them by the protocol, and make rows.

The functions run in this process or in a Ray actor, and do not use the store.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memvec.arms.shared_m import Shared, for_shared_m
from memvec.cramming.batch import Job, Progress
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.starts import resolve_start_rule, view_for
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.seeds import refuse_idle_seed
from memvec.lab.sources import Source, SourcedPassage
from memvec.lab.study.cells import Cell
from memvec.lab.study.row import Row, StoreEntry
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import ids_hash


def find_passages(
    lm: FrozenLM, cell: Cell, source: Source, count: int, base: Path | None
) -> list[SourcedPassage]:
    """The cell's passages: `count` of them, from its source.

    Raises MemvecError for a length that leaves nothing to cram or does not fit the model's context,
    as the source, and for a seed other than 0 on which nothing depends.
    """
    recipe = cell.to_recipe()
    advice = "so all restarts are the same one. Write start = 'noise' in the run's recipe."
    refuse_idle_seed(lm, recipe, advice)
    start_rule = resolve_start_rule(lm, recipe)
    tokens = protocol_of(cell.protocol).tokens(cell.length, cell.vectors, start_rule)
    shortest = 1 + (start_rule == "first-token") + source.bos
    if tokens < shortest:
        raise MemvecError(f"a length of {cell.length} leaves nothing to cram: use at least 2.")
    view = view_for(lm, recipe)
    around = cell.vectors + len(view.front) + len(view.trigger) * (start_rule == "bos")
    longest = None if lm.context is None else lm.context - around
    if longest is not None and tokens > longest:
        raise MemvecError(
            f"impossible length: {tokens} tokens and {cell.vectors} vectors do not fit the "
            f"context of {lm.name} ({lm.context} tokens)."
        )
    # The tokens that a passage begins with before its text.
    head = (lm.bos_id,) if source.bos and lm.bos_id is not None and lm.adds_bos else ()
    asked = tokens - len(head)
    drawn = list(itertools.islice(source.passages(lm, count, asked, base) or (), count))
    if len(drawn) < count:
        raise MemvecError(f"source '{cell.source}' gave {len(drawn)} passages of {count}.")
    for number, sourced in enumerate(drawn):
        _check_drawn(f"source '{cell.source}'", sourced, number, asked, lm)
    return [replace(p, passage=replace(p.passage, ids=(*head, *p.passage.ids))) for p in drawn]


def _check_drawn(source: str, sourced: Any, number: int, longest: int, lm: FrozenLM) -> None:
    """Raise MemvecError unless a source gave the passage of this number, of tokens of the model."""
    if not isinstance(sourced, SourcedPassage):
        raise MemvecError(f"{source} gives {type(sourced).__name__}, not SourcedPassage.")
    if sourced.number != number:
        raise MemvecError(
            f"{source} gives number {sourced.number} where number {number} is due: passages are "
            "numbered from 0, in order."
        )
    ids = sourced.passage.ids
    if len(ids) > longest:
        raise MemvecError(
            f"{source} gives passage {number} with {len(ids)} tokens: from 1 to {longest} were "
            "asked for."
        )
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < lm.vocab_size:
            raise MemvecError(
                f"{source} gives passage {number} the token {token!r}: tokens of {lm.name} are "
                f"integers from 0 to {lm.vocab_size - 1}."
            )


def cram_cell(
    lm: FrozenLM,
    cell: Cell,
    passages: Sequence[SourcedPassage],
    batch_size: int,
    *,
    beside: Sequence[SourcedPassage],
    worker: str,
    on_progress: Callable[[Progress], None] | None,
) -> Iterator[StoreEntry]:
    """Rows of a cell's passages, each as soon as it is certified.

    `beside`: passages of the same group that have rows and are crammed again with the others, for
    protocols whose passages share a vector (see `StudyUnit`).
    """
    recipe, protocol = cell.to_recipe(), protocol_of(cell.protocol)
    lm = lm.read_as(protocol.reading(cell.length, cell.options))
    entry = functools.partial(_entry, cell=cell, worker=worker)
    if protocol.group_size(cell.options):
        group = sorted([*passages, *beside], key=lambda sourced: sourced.number)
        shared = Shared(
            lm,
            for_shared_m(recipe),
            batch_size=batch_size,
            storage=cell.storage,
            on_progress=on_progress,
        )
        jobs = [Job(sourced.passage, shared.recipe.margin) for sourced in group]
        numbers = {sourced.number for sourced in passages}
        for sourced, outcome in zip(group, shared.run(jobs), strict=True):
            if sourced.number in numbers:
                size = shared.batch_size  # smaller if memory ran out
                yield entry(lm, sourced, outcome, start_rule="vectors", batch_size=size)
        return
    engine = Engine(
        lm,
        recipe,
        vectors=cell.vectors,
        batch_size=batch_size,
        storage=cell.storage,
        fixed_shapes=cell.fixed_shapes,
        on_progress=on_progress,
    )
    by_hash: dict[str, list[SourcedPassage]] = {}
    for sourced in passages:  # equal passages have equal rows but for their number
        by_hash.setdefault(ids_hash(sourced.passage.ids), []).append(sourced)
    for outcome in engine.run([group[0].passage for group in by_hash.values()]):
        for sourced in by_hash[ids_hash(outcome.passage.ids)]:
            # engine.lm has the trigger, lm has not.
            start_rule, size = engine.start_rule, engine.batch_size
            yield entry(engine.lm, sourced, outcome, start_rule=start_rule, batch_size=size)


def _entry(
    lm: FrozenLM,
    sourced: SourcedPassage,
    outcome: Outcome,
    *,
    cell: Cell,
    start_rule: StartRule,
    batch_size: int,
    worker: str,
) -> StoreEntry:
    scores = outcome.scores
    assert scores is not None, "an outcome that comes from the engine has its scores"
    reached = scores[: outcome.metrics.horizon]
    row = Row(
        **outcome.result.model_dump(),
        cell=cell.key,
        number=sourced.number,
        passage=ids_hash(sourced.passage.ids),
        lm_right=int((scores.lm_margin > 0).sum()),
        horizon_gain=reached.information_gain(),
        horizon_token_gain=reached.token_gain(),
        least_loss_gain=_least_loss_gain(outcome),
        start_rule=start_rule,
        batch_size=batch_size,
        worker=worker,
        extra=_extra(lm, cell, sourced, outcome, start_rule),
    )
    return StoreEntry(row, outcome.vectors, scores.stacked()).to_plain()


def _least_loss_gain(outcome: Outcome) -> float:
    """Information gain at the least loss of all steps, bits; NaN where it was not measured."""
    gain = outcome.metrics.lm_bits - outcome.min_mem_bits
    return gain if math.isfinite(gain) else math.nan


def _extra(
    lm: FrozenLM, cell: Cell, sourced: SourcedPassage, outcome: Outcome, start_rule: StartRule
) -> dict[str, Any]:
    """The protocol's extra measurements. Raises MemvecError if they differ from its `extras`."""
    protocol, recipe = protocol_of(cell.protocol), cell.to_recipe()
    extra: dict[str, Any] = protocol.extra_of_cell(
        lm, sourced, outcome, start_rule, recipe, cell.options
    )
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise MemvecError(
            f"protocol '{cell.protocol}' measured what JSON cannot hold ({error}): give numbers, "
            "texts, lists or None."
        ) from None
    if not isinstance(extra, dict) or extra.keys() != protocol.extras.keys():
        raise MemvecError(
            f"protocol '{cell.protocol}' measured {sorted(extra or ())} and documents "
            f"{sorted(protocol.extras)}: `extras` must have a sentence for each."
        )
    return extra
