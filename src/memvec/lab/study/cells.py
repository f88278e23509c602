"""Cells of a spec. The key of a row is the key of its cell and the number of its passage.

A cell has everything that decides the numbers of its rows and nothing else. Its key is a hash of
this, so a changed spec keeps the rows of the cells that it shares with the earlier one. The number
of passages is not part of the cell: a spec with more passages adds rows to those that exist.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.spec import ModelKey, ModelSpec, RunSpec, Spec, options_of
from memvec.model.estimate import Facts
from memvec.recipe_effect import check_effect
from memvec.usable.recipe_files import hashes_of, named_files
from memvec.writing import path_of


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One protocol, model, source, length, K and seed. All fields go into the key.

    `length` is that of the spec, whose meaning the protocol defines (`Protocol.tokens`), `vectors`
    is K. `recipe` has all fields of the recipe, `options` those of the protocol.
    """

    protocol: str
    model: str
    revision: str | None
    dtype: str
    source: str
    source_settings: dict[str, Any]
    length: int
    vectors: int
    seed: int
    recipe: dict[str, Any]
    options: dict[str, Any]
    storage: str
    fixed_shapes: bool
    files: dict[str, str] = field(default_factory=dict)
    """Hashes of the files that recipe and protocol name: another one of a name is another cell."""
    quantize: str | None = None

    @functools.cached_property
    def key(self) -> str:
        """Sixteen hex digits of the SHA-256 of all fields."""
        text = json.dumps(self.settings(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """As a plain dictionary; without `files` where none is named, and without no `quantize`."""
        settings = asdict(self)
        for name in ("files", "quantize"):
            if not settings[name]:  # as in the keys of cells from before the field existed
                del settings[name]
        return settings

    @property
    def model_key(self) -> ModelKey:
        """Which model of the spec the cell belongs to."""
        return ModelKey(self.model, self.revision, self.dtype, self.quantize)

    def to_recipe(self) -> Recipe:
        """The cell's recipe as a Recipe."""
        return Recipe(**self.recipe)


@dataclass(frozen=True)
class Planned:
    """A cell and the number of passages that the spec plans for it."""

    cell: Cell
    passages: int
    batch_size: int  # passages crammed at once on a device


def expand(spec: Spec, base: str | os.PathLike[str] | None = None) -> list[Planned]:
    """All cells of a spec, model by model.

    Raises MemvecError for duplicates, bad recipes, or a spec without any cell.
    """
    base = None if base is None else path_of(base)
    settings = {s.name: s.settings(base) for s in spec.sources}
    planned: dict[str, Planned] = {}
    for model in spec.models:
        for number, run in enumerate(spec.runs, 1):
            if run.models and model.name not in run.models:
                continue
            for cell in _cells(spec, number, model, settings):
                if cell.key in planned:
                    raise MemvecError(
                        f"run {number} repeats a cell: {run.protocol}, {model.name}, "
                        f"{cell.source}, length {cell.length}, K {cell.vectors}, seed {cell.seed} "
                        "is in the spec twice: remove one."
                    )
                planned[cell.key] = Planned(cell, run.passages, spec.batch_size)
    if not planned:
        raise MemvecError("the spec has no cells: no run names a model of it.")
    return list(planned.values())


def _cells(
    spec: Spec, number: int, model: ModelSpec, settings: dict[str, dict[str, Any]]
) -> Iterator[Cell]:
    """The cells of a run, counted from 1, for a model: sources x lengths x vectors x seeds."""
    run = spec.runs[number - 1]
    axes = (run.sources or tuple(settings), run.lengths, run.vectors, run.seeds)
    try:
        recipe = recipe_of(run, seed=0)
        check_effect(recipe, run.recipe)
    except MemvecError as error:
        raise MemvecError(f"run {number} ({run.protocol}): {error}") from None
    files = protocol_of(run.protocol).files(options_of(run))
    hashes = named_files(recipe) | hashes_of(files)  # the same for every seed
    for source, length, K, seed in itertools.product(*axes):
        yield Cell(
            protocol=run.protocol,
            model=model.name,
            revision=model.revision,
            dtype=model.dtype,
            source=source,
            source_settings=settings[source],
            length=length,
            vectors=K,
            seed=seed,
            recipe=recipe_of(run, seed).record(),
            options=options_of(run),
            storage=run.storage or spec.storage,
            fixed_shapes=spec.fixed_shapes,
            files=hashes,
            quantize=model.quantize,
        )


def recipe_of(run: RunSpec, seed: int) -> Recipe:
    """The protocol's recipe with the run's changes. Raises MemvecError as `Recipe.of`."""
    protocol = protocol_of(run.protocol)
    changes = dict(run.recipe)
    preset = str(changes.pop("preset", protocol.preset))
    if run.budget:
        changes["budget"] = run.budget
    return Recipe.of(preset, **{**protocol.changes, **changes, "seed": seed})


def too_long(cell: Cell, facts: Facts | None) -> str | None:
    """A sentence if the cell cannot fit the model's context, as far as it is known."""
    if facts is None or facts.context is None:
        return None
    tokens = protocol_of(cell.protocol).tokens(cell.length, cell.vectors, "vectors")
    if tokens + cell.vectors > facts.context:
        return (
            f"impossible length: {tokens} tokens and {cell.vectors} vectors do not fit the "
            f"context of {cell.model} ({facts.context} tokens)."
        )
    return None
