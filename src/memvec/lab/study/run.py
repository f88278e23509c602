"""Run a study: cram all planned passages without a row in a pool, and store each finished row.

A run can be stopped at any time and started again: a passage with a row is not crammed again, and
the store takes a row only once. Only this process writes to the store.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memvec.cramming.batch import Progress
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.sources import Source
from memvec.lab.study.cells import Planned, expand
from memvec.lab.study.model_names import model_names
from memvec.lab.study.pool import Pool, StudyUnit, in_units
from memvec.lab.study.price import max_tokens, problems
from memvec.lab.study.spec import ModelSpec, Spec
from memvec.lab.study.store import Store
from memvec.machine import plain_torch
from memvec.passages.passage import Passage, ids_hash
from memvec.writing import path_of

REPORT_EVERY = 0.2  # seconds
MakePool = Callable[[ModelSpec], Pool]


@dataclass(frozen=True)
class StudyStatus:
    """Progress of a study, for a display."""

    cells_done: int
    cells: int
    rows: int
    planned: int
    rows_now: int  # rows of this process
    seconds: float  # of this process
    left: float | None  # estimated remaining seconds, None while unknown
    what: str  # what is done now, a phrase to show
    horizon: float | None  # mean leading right tokens of the passages in work, None while unknown

    @property
    def per_minute(self) -> float:
        """Passages per minute of this process."""
        return 60 * self.rows_now / self.seconds if self.seconds > 0 else 0.0


@plain_torch()
def run_study(
    spec: Spec,
    folder: str | os.PathLike[str],
    make_pool: MakePool,
    *,
    base: str | os.PathLike[str] | None = None,
    toml: str = "",
    model: str | None = None,
    on_status: Callable[[StudyStatus], None] | None = None,
) -> StudyStatus:
    """Run the remaining passages of a study.

    `make_pool` makes what crams for each model of the spec, such as
    `LocalPool(load_lm(model.name, revision=model.revision, dtype=model.dtype))`, with
    `quantize=model.quantize` where the spec has it. Files that the spec names are relative to
    `base`. The folder keeps the text of the spec, `toml`, and the `model` that `parse_spec` was
    given, for its report and `memvec study resume`.
    Raises MemvecError for errors in the spec or its files, for a folder of another study, and if
    passages come back without a row.
    """
    base = None if base is None else path_of(base)
    planned = expand(spec, base)
    for sentence in problems(spec, planned, base):
        raise MemvecError(sentence)
    with Store(folder, write=True) as store:
        if (held := store.meta("name")) and held != spec.name:
            raise MemvecError(
                f"{folder} holds the study {held}: name another folder, or give the spec that name."
            )
        drawn = {s.name for s in spec.sources if s.random_text}
        kept = json.dumps({"toml": toml, "model": model}) if toml else ""
        about = {"name": spec.name, "about": spec.about, "spec": kept, "base": str(base or "")}
        store.plan(planned, drawn, {**about, "batch_size": str(spec.batch_size)})
        return _Run(spec, store, planned, base, on_status).run(make_pool)


def _check_model(model: ModelSpec, description: dict[str, Any]) -> None:
    """Raise MemvecError for a pool's model that was not loaded as the spec says."""
    if model.dtype not in ("auto", description.get("dtype")):
        name = "dtype"
    elif model.quantize != description.get("quantize"):
        name = "quantize"
    elif model.revision is not None and description.get("revision") is None:
        name = "revision"  # which a description may have as its commit
    else:
        return
    value = getattr(model, name)
    said = f"no {name}" if value is None else f'{name} = "{value}"'
    raise MemvecError(
        f"the spec has {said} for {model.name}, and the model that was loaded has "
        f"{description.get(name)}: pass {name} to load_lm as the spec has it."
    )


class _Run:
    """One call of `run_study`."""

    def __init__(
        self,
        spec: Spec,
        store: Store,
        planned: list[Planned],
        base: Path | None,
        on_status: Callable[[StudyStatus], None] | None,
    ) -> None:
        self.spec, self.store, self.planned, self.base = spec, store, planned, base
        self.on_status = on_status
        self.sources: dict[str, Source] = {s.name: s for s in spec.sources}
        self.began = time.monotonic()
        self.names = model_names([model.key for model in spec.models])
        self.passages = {p.cell.key: p.passages for p in planned}
        for p in planned:
            _drop_unfinished_groups(store, p)
        # Rows are written in the order in which passages finish, so an earlier plan with more
        # passages may have left rows beyond this plan and gaps within it.
        self.done = {key: sum(i < n for i in store.done(key)) for key, n in self.passages.items()}
        self.costs = {p.cell.key: max_tokens(p) for p in planned}
        self.reported = 0.0
        self.rows_now = 0
        self.cost_now = 0.0
        self.what, self.horizon = "starting", None  # type: tuple[str, float | None]

    def run(self, make_pool: MakePool) -> StudyStatus:
        for model in self.spec.models:
            cells_of_model = [p for p in self.planned if p.cell.model_key == model.key]
            if not any(self._left(p) for p in cells_of_model) and not any(
                self._open_pairs(cells_of_model)
            ):
                continue
            self.what = f"loading {self.names[model.key]}"
            self._report()
            pool = make_pool(model)
            try:
                _check_model(model, pool.description())
                self.store.set_environment({**pool.environment(), "model": pool.description()})
                for finished in pool.cram(self._units(cells_of_model, pool), self._progress):
                    self.store.put(finished)
                    key = finished.row.cell
                    self.done[key] += finished.row.number < self.passages[key]
                    self.rows_now += 1
                    self.cost_now += self.costs[key]
                    self._report()
                self._compare_restarts(cells_of_model, pool)
            finally:
                pool.close()
                del pool  # it holds the model: the next one is loaded without it
        self.what = "done"
        self._report()
        status = self.status()
        if status.rows < status.planned:  # the store decides whether the study is done
            raise MemvecError(
                f"{status.planned - status.rows} of {status.planned} passages came back without a "
                "row: run the same command again."
            )
        return status

    # ------------------------------------------------------------------ what is to do

    def _left(self, p: Planned) -> int:
        return p.passages - self.done[p.cell.key]

    def _units(self, planned: list[Planned], pool: Pool) -> Iterator[StudyUnit]:
        """Units of all cells that are not done, each made when the pool takes it."""
        description = pool.description()
        earlier: dict[str, dict[int, tuple[int, ...]]] = {}  # passages of each source
        for p in planned:
            known = self.store.done(p.cell.key)
            if not self._left(p):
                continue
            self.what = self._name(p)
            self.store.describe(p.cell.key, description)
            texts = pool.find(p.cell, self.sources[p.cell.source], p.passages, self.base)
            hashes = [ids_hash(f.passage.ids) for f in texts.passages]
            if p.cell.source not in earlier:
                earlier[p.cell.source] = self.store.known_passages(p.cell.key)
            for f, key in zip(texts.passages, hashes, strict=True):
                # A passage of one length is the beginning of the same passage of another.
                ids = f.passage.ids
                before = earlier[p.cell.source].setdefault(f.number, ids)
                n = min(len(ids), len(before))
                moved = self.sources[p.cell.source].starts_alike and before[:n] != ids[:n]
                if known.get(f.number, key) != key or moved:
                    raise MemvecError(
                        f"source '{p.cell.source}' gives another passage {f.number} than when this "
                        "study began: put the old texts back, or use another folder."
                    )
            entries = list(zip(hashes, texts.passages, texts.texts, strict=True))
            self.store.put_passages(p.cell.key, entries)
            left = sum(f.number not in known for f in texts.passages)
            size = pool.unit_size(left, p.batch_size)
            yield from in_units(p.cell, texts.passages, size, p.batch_size, known)

    def _open_pairs(self, planned: list[Planned]) -> Iterator[tuple[Planned, Planned, int]]:
        """All pairs of restarts that are not compared yet: (first, other, passage)."""
        restarts = [p for p in planned if protocol_of(p.cell.protocol).compares_restarts]
        known = set(self.store.db.execute("SELECT first, second, number FROM paths"))

        def group(p: Planned) -> str:
            recipe = {k: v for k, v in p.cell.recipe.items() if k != "seed"}
            return str(sorted(asdict(replace(p.cell, seed=0, recipe=recipe)).items(), key=str))

        for _, same in itertools.groupby(sorted(restarts, key=group), key=group):
            ordered = sorted(same, key=lambda p: p.cell.seed)
            for first, other in itertools.combinations(ordered, 2):
                # A run may ask for more passages of one seed than of another.
                for number in range(min(first.passages, other.passages)):
                    if (first.cell.key, other.cell.key, number) not in known:
                        yield first, other, number

    def _compare_restarts(self, planned: list[Planned], pool: Pool) -> None:
        for first, other, number in list(self._open_pairs(planned)):
            self.what = "comparing restarts"
            a, b = first.cell.key, other.cell.key
            self.store.describe(
                a, pool.description()
            )  # only the model of its rows may compare them
            row = self.store.db.execute(
                "SELECT start_rule FROM rows WHERE cell=? AND number=?", (a, number)
            ).fetchone()
            ids = self.store.passage(a, number).ids
            one, two = (self.store.tensors(key, number)[0] for key in (a, b))
            values = pool.between(first.cell, Passage(ids), one, two, row[0])
            self.store.put_path(a, b, number, values)

    # ------------------------------------------------------------------ progress

    def _name(self, p: Planned) -> str:
        """What the cell is, for the display."""
        c, model = p.cell, self.names[p.cell.model_key]
        numbers = f"{c.length} tokens · K {c.vectors} · seed {c.seed}"
        return f"{c.protocol} · {model} · {c.source} · {numbers}"

    def status(self) -> StudyStatus:
        """Progress so far."""
        seconds = time.monotonic() - self.began
        left = sum(self.costs[p.cell.key] * self._left(p) for p in self.planned)
        return StudyStatus(
            cells_done=sum(not self._left(p) for p in self.planned),
            cells=len(self.planned),
            rows=sum(min(self.done[p.cell.key], p.passages) for p in self.planned),
            planned=sum(p.passages for p in self.planned),
            rows_now=self.rows_now,
            seconds=seconds,
            left=left * seconds / self.cost_now if self.cost_now else None,
            what=self.what,
            horizon=self.horizon,
        )

    def _progress(self, progress: Progress) -> None:
        self.horizon = progress.horizon
        self._report()

    def _report(self) -> None:
        # A status looks at every cell: not at every step.
        if self.on_status is not None and time.monotonic() - self.reported > REPORT_EVERY:
            self.on_status(self.status())
            self.reported = time.monotonic()


def _drop_unfinished_groups(store: Store, p: Planned) -> None:
    """Delete the rows of groups that an interruption left without some of their rows.

    The passages of a group share a vector, so all of its rows must come from one cramming.
    """
    if size := protocol_of(p.cell.protocol).group_size(p.cell.options):
        store.db.execute(
            "DELETE FROM rows WHERE cell = :cell AND number / :size IN (SELECT number / :size "
            "FROM rows WHERE cell = :cell GROUP BY number / :size HAVING count(*) < :size)",
            {"cell": p.cell.key, "size": size},
        )
