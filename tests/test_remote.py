"""The pool of actors, with a Ray that dies on command: no passage may get lost or come twice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from memvec.cramming.engine import Progress
from memvec.errors import MemvecError
from memvec.passages.found import Found
from memvec.passages.passage import Passage
from memvec.study.cells import expand
from memvec.study.pool import Unit, in_units
from memvec.study.remote import Remote, _Seat, together
from memvec.study.row import Finished
from memvec.study.spec import parse_spec
from studies import HEAD
from test_report import alike


class DiedError(Exception):
    """Stands for Ray's RayActorError."""


class Actor:
    """An actor whose stream follows a script: how many rows it gives, and how it ends."""

    def __init__(self, rows: int, end: str) -> None:
        self.rows, self.end = rows, end
        self.cram = SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda unit: self.stream(unit))
        )

    def stream(self, unit: Unit) -> Any:
        """Rows of the unit, then its end."""
        for found in unit.passages[: self.rows]:
            yield alike(unit.cell.key, found.number, 1, "exact")
        if self.end == "error" and self.rows < len(unit.passages):
            yield DiedError("killed")


def get(item: Finished | Exception) -> Finished:
    """Ray's get: errors in a reference are raised."""
    if isinstance(item, Exception):
        raise item
    return item


def pool(*actors: Actor, spare: Callable[[], Actor]) -> Remote:
    """A pool of scripted actors; the dead are replaced by `spare()`."""
    made = object.__new__(Remote)
    errors = SimpleNamespace(RayActorError=DiedError, RayTaskError=ZeroDivisionError)
    made.ray = SimpleNamespace(
        wait=lambda rows, **_: (rows, []), get=get, exceptions=errors, kill=lambda _: None
    )
    made.count = len(actors)
    made.seats = [_Seat(f"ray-{i}", actor) for i, actor in enumerate(actors)]
    made._made = made._deaths = 0
    made._asked = None
    told = {f"ray-{i}": Progress(2, i, 3.0 + 4 * i, 10, 100) for i in range(len(actors))}
    made.news = SimpleNamespace(all=SimpleNamespace(remote=lambda: told))
    made._hire = lambda: _Seat("spare", spare())  # type: ignore[method-assign]
    return made


def units(n: int, size: int) -> list[Unit]:
    cell = expand(parse_spec(HEAD + '[[runs]]\nprotocol = "exact"\nlengths = [3]\n', "spec"))[
        0
    ].cell
    found = [Found(i, Passage((2, 3, 4)), "x") for i in range(n)]
    return list(in_units(cell, found, size, 2))


@pytest.mark.parametrize("end", ["error", "silence"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_dead_workers_passages_come_from_another(end: str, rows: int) -> None:
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(rows, end), spare=lambda: healthy)
    numbers = [f.row.number for f in made.cram(units(11, 3), None)]
    assert sorted(numbers) == list(range(11))


def test_a_worker_that_dies_while_a_unit_is_being_made_loses_nothing() -> None:
    healthy = Actor(99, "done")
    made = pool(Actor(0, "error"), spare=lambda: healthy)

    def slowly() -> Any:
        for unit in units(6, 3):
            made._replace(made.seats[0])  # what a failed call to it does
            yield unit

    numbers = [f.row.number for f in made.cram(slowly(), None)]
    assert sorted(numbers) == list(range(6))


def test_workers_that_keep_dying_end_the_study() -> None:
    made = pool(Actor(0, "error"), spare=lambda: Actor(0, "error"))
    with pytest.raises(MemvecError, match="workers died, the last one with: killed"):
        list(made.cram(units(6, 3), None))
    assert made.unit_size(100, 8) == 32
    assert made.unit_size(3, 8) == 2
    made.close()


def test_the_horizon_of_all_workers_is_shown() -> None:
    """The mean over the seats of those at work; who has left is not counted."""
    healthy = Actor(99, "done")
    made = pool(healthy, Actor(99, "done"), spare=lambda: healthy)
    seen: list[Progress] = []
    list(made.cram(units(4, 2), seen.append))
    assert {p.horizon for p in seen} <= {3.0, 5.0, 7.0}  # one, both, the other
    assert 5.0 in {p.horizon for p in seen}
    assert together([]) is None
    assert together([Progress(1, 0, 2.0, 5, 50), Progress(3, 4, 6.0, 7, 70)]) == Progress(
        4, 4, 5.0, 12, 120
    )
