"""Studies: a spec of cells, a store of rows, a run that can be killed, a check and a report."""
