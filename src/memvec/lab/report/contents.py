"""Contents of a report: the tables and figures of each protocol, and those over protocols."""

from __future__ import annotations

from typing import Any

from memvec import registry
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import plane_of, protocol_names, protocol_of
from memvec.lab.protocols.protocol import Card
from memvec.lab.report.byte_account import bytes_table
from memvec.lab.report.cost import cost_table
from memvec.lab.report.data import Data
from memvec.lab.report.lengths import lengths
from memvec.lab.report.models import models_table
from memvec.lab.report.plot import Plot
from memvec.lab.report.positions import positions_figure, positions_table
from memvec.lab.report.recipes import recipes_table
from memvec.lab.report.seeds import seeds_table
from memvec.lab.report.table import Table
from memvec.lab.report.texts import texts_table
from memvec.lab.report.utilisation import utilisation_figure, utilisation_table


def all_tables(data: Data, *, compare: bool) -> list[Table]:
    """Every table the study has rows for. `compare`: the paper's values in extra columns."""
    tables = _of_protocols(data, "tables", Table, compare=compare)
    tables += [texts_table(data), recipes_table(data), seeds_table(data)]
    tables += [utilisation_table(data), positions_table(data)]
    tables += [bytes_table(data, compare=compare), models_table(data), cost_table(data)]
    return [table for table in tables if table.rows]


def all_plots(data: Data, *, compare: bool) -> list[Plot]:
    """Every figure the study has rows for. `compare`: the paper's values as extra series."""
    plots = [lengths(data, compare=compare), *_of_protocols(data, "figures", Plot, compare=compare)]
    plots += [utilisation_figure(data, compare=compare), positions_figure(data)]
    return [plot for plot in plots if plot.panels]


def all_cards(data: Data) -> list[Card]:
    """The first numbers of the page, by protocol."""
    return [card for name in data.protocols() for card in _given(data, name, "cards", Card)]


def _of_protocols(data: Data, method: str, kind: type, **compare: bool) -> list[Any]:
    """What this method gives for each protocol, in one list.

    A protocol of another package is left out if it has no rows in its plane, so that it cannot
    change the report of another study.
    """
    planes = {plane_of(name) for name in data.protocols()}
    built_in = registry.BUILT_IN["protocol"]
    names = [name for name in protocol_names() if name in built_in or plane_of(name) in planes]
    return [item for name in names for item in _given(data, name, method, kind, **compare)]


def _given(data: Data, name: str, method: str, kind: type, **compare: bool) -> list[Any]:
    """What a protocol's method gives. Raises MemvecError unless it is a list of `kind`."""
    given = getattr(protocol_of(name), method)(data, **compare)
    if not isinstance(given, list) or not all(isinstance(item, kind) for item in given):
        raise MemvecError(
            f"the protocol '{name}' has to return a list of {kind.__name__} from {method}, which "
            "may be empty."
        )
    return given
