"""What a study would cost: passages, time and memory, from config facts alone.

A forward-backward token of a frozen model costs about 4 floating-point operations per parameter
(2 forward, 2 for the gradient at the inputs; weights get none). Times are for the whole budget of
steps, so they are an upper bound: passages stop when they are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memvec.lab.protocols import PROTOCOLS
from memvec.lab.study.cells import Planned, too_long
from memvec.lab.study.facts import Facts, facts_of
from memvec.lab.study.spec import Spec
from memvec.model.estimate import LOGITS_COPIES
from memvec.model.memory import LOGITS_AT_ONCE

GPU_FLOPS = 120e12  # sustained on an A100 in bfloat16: 40 % of its peak, an assumption
CPU_FLOPS = 100e9  # two cores with AVX-512: 64 GFLOP/s a core for pocket, 16 slots of 64 tokens
OPERATIONS = 4  # per parameter and forward-backward token
NUMBERS_KEPT = 16  # of the hidden size, per token and layer, between forward and backward


@dataclass(frozen=True)
class Price:
    """One model's part of a study, at most."""

    model: str
    cells: int
    passages: int
    gpu_hours: float | None  # None: nothing is known of the model
    cpu_hours: float | None
    memory_gib: float | None  # weights in bfloat16, activations of all slots, logits of a chunk


def price(planned: Sequence[Planned]) -> list[Price]:
    """The price of each model of a plan."""
    found = []
    for model in dict.fromkeys(p.cell.model for p in planned):
        mine = [p for p in planned if p.cell.model == model]
        cells, passages = len(mine), sum(p.passages for p in mine)
        facts = facts_of(model)
        if facts is None:
            found.append(Price(model, cells, passages, None, None, None))
            continue
        work = sum(_tokens(p) * p.passages for p in mine) * OPERATIONS * facts.parameters
        memory = max(_memory(p, facts) for p in mine)
        found.append(
            Price(
                model,
                cells,
                passages,
                work / GPU_FLOPS / 3600,
                work / CPU_FLOPS / 3600,
                memory / 2**30,
            )
        )
    return found


def problems(spec: Spec, planned: Sequence[Planned], base: Path | None) -> list[str]:
    """Sentences about what stands in the way, without loading anything."""
    found = [s for source in spec.sources if (s := source.missing(base))]
    for model in dict.fromkeys(p.cell.model for p in planned):
        facts = facts_of(model)
        mine = [p for p in planned if p.cell.model == model]
        found += dict.fromkeys(s for p in mine if (s := too_long(p.cell, facts)))
    return found


def _tokens(p: Planned) -> float:
    """Most forward-backward tokens of a passage."""
    c = p.cell
    each = PROTOCOLS[c.protocol].tokens(c.length, c.vectors, "vectors") + c.vectors
    most = each * int(c.recipe["steps"])
    budget = int(c.recipe["budget"])
    return float(min(most, budget + each) if budget else most)


def _memory(p: Planned, facts: Facts) -> float:
    c = p.cell
    tokens = PROTOCOLS[c.protocol].tokens(c.length, c.vectors, "vectors") + c.vectors
    weights = 2 * facts.parameters
    activations = p.batch_size * tokens * facts.layers * facts.hidden * NUMBERS_KEPT * 2
    return weights + activations + LOGITS_COPIES * 4 * LOGITS_AT_ONCE
