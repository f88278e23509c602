"""What a study cost: steps, forward-backward tokens and seconds."""

from __future__ import annotations

from memvec.lab.report.data import Data, short
from memvec.lab.report.table import Table, TableCell


def cost_table(data: Data) -> Table:
    """One line for each model and protocol."""
    rows: list[list[TableCell]] = []
    for (model, protocol), g in data.rows.groupby(["model", "protocol"], sort=False):
        row: list[TableCell] = [short(str(model)), str(protocol), g["cell"].nunique(), len(g)]
        rows.append([*row, int(g["steps"].sum()), int(g["spent"].sum()), float(g["seconds"].sum())])
    return Table(
        "cost",
        "What was spent",
        "Optimiser steps, forward-backward tokens and seconds, summed over all passages. Without "
        "what a protocol crams besides them (`transfer`, `recurrent`, `reading`, `sentences`).",
        ["model", "protocol", "cells", "passages", "steps", "tokens", "seconds"],
        rows,
    )
