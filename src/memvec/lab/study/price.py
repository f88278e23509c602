"""The cost of a study in passages, time and memory, computed from model configs alone.

A forward-backward token of a frozen model costs about 4 floating-point operations per parameter
(2 forward, 2 for the gradient at the inputs; weights get none). Memory is the peak of a step by
`model.estimate`, with weights in bfloat16. Times assume that every passage uses all its steps, at a
rate that only large models reach.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.cells import Cell, Planned, too_long
from memvec.lab.study.facts import facts_of_name
from memvec.lab.study.model_names import loading_words
from memvec.lab.study.spec import Spec
from memvec.loading import local_folder
from memvec.model.estimate import Facts, estimate
from memvec.writing import path_of

OPERATIONS = 4  # per parameter and forward-backward token: weights get no gradient

GPU_FLOPS = 120e12  # sustained on an A100 in bfloat16: 40 % of its peak, an assumption
CPU_FLOPS = 100e9  # two cores with AVX-512: 64 GFLOP/s a core for pocket, 16 slots of 64 tokens


@dataclass(frozen=True)
class Price:
    """The maximum cost of one model's part of a study."""

    model: str
    cells: int
    passages: int
    _: KW_ONLY
    gpu_hours: float | None  # None: nothing is known of the model
    cpu_hours: float | None
    memory_gib: float | None  # peak of a step: weights, activations, logits and slots
    loaded: str = ""  # 'bfloat16, 8bit', where the name does not say which model it is


def price(planned: Sequence[Planned]) -> list[Price]:
    """The price of each model of a plan. Raises MemvecError as `facts_of_name`."""
    prices = []
    for key, loaded in loading_words(p.cell.model_key for p in planned).items():
        cells_of_model = [p for p in planned if p.cell.model_key == key]
        cells, passages = len(cells_of_model), sum(p.passages for p in cells_of_model)
        gpu = cpu = memory = None
        if (facts := facts_of_name(key.name)) is not None:
            tokens = sum(max_tokens(p) * p.passages for p in cells_of_model)
            gpu, cpu = (hours(facts, tokens, flops) for flops in (GPU_FLOPS, CPU_FLOPS))
            memory = max(_memory(p, facts) for p in cells_of_model) / 2**30
        costs = {"gpu_hours": gpu, "cpu_hours": cpu, "memory_gib": memory}
        prices.append(Price(key.name, cells, passages, **costs, loaded=loaded))
    return prices


def problems(
    spec: Spec, planned: Sequence[Planned], base: str | os.PathLike[str] | None
) -> list[str]:
    """Sentences about what prevents a run; loads no model. Raises as `facts_of_name`."""
    base = None if base is None else path_of(base)
    asked: dict[str, int] = {}
    for p in planned:
        asked[p.cell.source] = max(p.passages, asked.get(p.cell.source, 0))
    sentences = []
    for source in spec.sources:
        count = asked.get(source.name)
        found = source.missing(base) or (count and source.too_few(count, base))
        sentences += [found] if found else []
    missing = (protocol_of(p.cell.protocol).missing(p.cell.options) for p in planned)
    sentences += [s for s in missing if s]
    for model, revision in dict.fromkeys((p.cell.model, p.cell.revision) for p in planned):
        facts = facts_of_name(model)
        try:
            # What is no folder here may be on the Hub.
            folder = local_folder(model)
            if folder is not None and revision is not None:
                sentences.append(
                    f"{model} is a folder here: only models of the Hub have a revision."
                )
            if folder is None and base is not None and (base / model / "config.json").is_file():
                sentences.append(
                    f"{model} is a folder beside the spec, and folders of models are looked for "
                    "where the command runs: run it there, or write the whole path in the spec."
                )
        except MemvecError as error:
            sentences.append(str(error))
        cells_of_model = [p for p in planned if p.cell.model == model]
        sentences += [s for p in cells_of_model if (s := too_long(p.cell, facts))]
    return list(dict.fromkeys(sentences))  # cells and revisions of a model have the same


def hours(facts: Facts, tokens: float, flops: float) -> float:
    """Hours for `tokens` forward-backward tokens, at `flops` operations per second."""
    return OPERATIONS * facts.parameters * tokens / flops / 3600


def _length(p: Planned) -> int:
    """Tokens of a passage."""
    return int(protocol_of(p.cell.protocol).tokens(p.cell.length, p.cell.vectors, "vectors"))


def _most_tokens(cell: Cell, tokens: int) -> float:
    """Forward-backward tokens of a passage that is crammed for all its steps, or its budget.

    A step reads the vectors and the passage, and with the second loss the vectors and a query.
    """
    recipe, K = cell.recipe, cell.vectors
    each = tokens + K
    if recipe.get("term") == "use":
        each += K + int(recipe["query_tokens"])
    total, budget = each * int(recipe["steps"]), int(recipe["budget"])
    return float(min(total, budget + each) if budget else total)


def max_tokens(p: Planned) -> float:
    """Forward-backward tokens of a passage that uses all its steps, or its budget.

    A passage has its part of what the protocol crams besides the cell's passages.
    """
    cell, tokens = p.cell, _length(p)
    number, each = protocol_of(cell.protocol).crammed_besides(p.passages, tokens, cell.options)
    return _most_tokens(cell, tokens) + float(number) / p.passages * _most_tokens(cell, each)


def _memory(p: Planned, facts: Facts) -> float:
    """Bytes at the peak of a step."""
    K = p.cell.vectors
    return estimate(facts, batch_size=p.batch_size, tokens=_length(p), vectors=K).total
