"""Contents of a report: the tables and figures of each protocol, and those over protocols."""

from __future__ import annotations

from memvec.lab.protocols.lookup import protocol_names, protocol_of
from memvec.lab.protocols.protocol import Card
from memvec.lab.report.byte_account import bytes_table
from memvec.lab.report.cost import cost_table
from memvec.lab.report.data import Data
from memvec.lab.report.lengths import lengths
from memvec.lab.report.plot import Plot
from memvec.lab.report.positions import positions_figure, positions_table
from memvec.lab.report.recipes import recipes_table
from memvec.lab.report.seeds import seeds_table
from memvec.lab.report.table import Table
from memvec.lab.report.texts import texts_table
from memvec.lab.report.utilisation import utilisation_figure, utilisation_table


def all_tables(data: Data, *, compare: bool) -> list[Table]:
    """Every table the study has rows for. `compare`: the paper's values in extra columns."""
    protocols = [protocol_of(name) for name in protocol_names()]
    tables = [table for p in protocols for table in p.tables(data, compare=compare)]
    tables += [texts_table(data), recipes_table(data), seeds_table(data)]
    tables += [utilisation_table(data), positions_table(data)]
    tables += [bytes_table(data, compare=compare), cost_table(data)]
    return [table for table in tables if table.rows]


def all_plots(data: Data, *, compare: bool) -> list[Plot]:
    """Every figure the study has rows for. `compare`: the paper's values as extra series."""
    protocols = [protocol_of(name) for name in protocol_names()]
    plots = [lengths(data, compare=compare)]
    plots += [plot for p in protocols for plot in p.figures(data, compare=compare)]
    plots += [utilisation_figure(data, compare=compare), positions_figure(data)]
    return [plot for plot in plots if plot.panels]


def all_cards(data: Data) -> list[Card]:
    """The first numbers of the page, by protocol."""
    return [card for name in data.protocols() for card in protocol_of(name).cards(data)]
