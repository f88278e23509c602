"""What a study cost: steps, forward-backward tokens and seconds."""

from __future__ import annotations

from memvec.lab.report.data import Data
from memvec.lab.report.table import Table, TableLine


def cost_table(data: Data) -> Table:
    """One line for each model and protocol."""
    lines: list[TableLine] = []
    for (model, protocol), g in data.rows.groupby(["model", "protocol"], sort=False):
        lines.append(
            [
                ("model", str(model)),
                ("protocol", str(protocol)),
                ("cells", g["cell"].nunique()),
                ("passages", len(g)),
                ("steps", int(g["steps"].sum())),
                ("tokens", int(g["spent"].sum())),
                ("seconds", float(g["seconds"].sum())),
            ]
        )
    return Table.of(
        "cost",
        "What was spent",
        "Optimiser steps, forward-backward tokens and seconds, summed over all passages. Without "
        "what a protocol crams besides them (`transfer`, `recurrent`, `reading`, `sentences`).",
        lines,
    )
