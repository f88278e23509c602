"""Does a study stay as fast when it grows? Synthetic rows into a store, then a report.

    python benchmarks/studies.py 100 1000 10000 100000

Prints one CSV line per size: milliseconds and bytes per row, peak memory, seconds until the page
(tables and page, no matplotlib figures) is written. No model is loaded.
"""

import contextlib
import io
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from memvec.passages.found import Found
from memvec.passages.passage import Passage
from memvec.report.report import write_report
from memvec.study.cells import expand
from memvec.study.row import Finished, Row, Text
from memvec.study.spec import parse_spec
from memvec.study.store import Store

D, T, PASSAGES = 64, 24, 250  # of a cell
SPEC = """
name = "synthetic"
[[models]]
name = "synthetic"
[[sources]]
kind = "random-tokens"
[[sources]]
kind = "sampled"
[[runs]]
protocol = "exact"
lengths = [24]
seeds = {seeds}
passages = {passages}
[[runs]]
protocol = "threshold"
lengths = [24]
seeds = {seeds}
passages = {passages}
"""


def row(cell, number, rng):
    """A made-up row."""
    bits = rng.uniform(40, 300)
    left = max(0.0, bits - 120) + rng.uniform(0, 3)
    horizon = int(rng.integers(1, T + 1))
    return Finished(
        Row(
            cell=cell,
            number=number,
            passage=f"p{number}",
            tokens=T,
            predicted=T,
            status="done",
            exact=horizon == T,
            horizon=horizon,
            accuracy=float(rng.uniform(0.3, 1)),
            margin=0.5,
            margin_asked=0.5,
            lm_bits=bits,
            mem_bits=left,
            information_gain=bits - left,
            token_gain=horizon,
            lm_right=0,
            horizon_gain=bits - left,
            horizon_token_gain=horizon,
            steps=100,
            spent=2400,
            seconds=0.1,
            start_rule="vectors",
            seats=8,
            worker="synthetic",
            extra={},
        ),
        torch.ones(1, D),
        torch.zeros(4, T),
    )


def main():
    """Print a line for each size."""
    sizes = [int(word) for word in sys.argv[1:]] or [100, 1000, 10_000]
    print("rows,cells,ms_per_row,ms_per_row_last_tenth,bytes_per_row,report_s,page_kB,peak_MiB")
    for size in sizes:
        passages = min(size // 4, PASSAGES)
        seeds = list(range(size // (4 * passages)))
        text = SPEC.format(seeds=seeds, passages=passages)
        planned = expand(parse_spec(text, "synthetic"))
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder), write=True) as store:
            store.plan(planned, {"random-tokens"}, {"name": "synthetic"})
            store.set_environment({})
            known = [
                (
                    f"p{i}",
                    Found(i, Passage((i + 1,) * T), "synthetic"),
                    Text(b"word " * T, ["w"] * T),
                )
                for i in range(passages)
            ]
            store.put_passages(known)
            description = {"weights": "w", "width": D, "vocabulary": 4096, "revision": None}
            times = []
            for p in planned:
                store.describe(p.cell.key, description)
                for number in range(passages):
                    finished = row(p.cell.key, number, rng)
                    began = time.perf_counter()
                    store.put(finished)
                    times.append(time.perf_counter() - began)
            used = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                page = write_report(Path(folder), Path(folder) / "report", figures=False)
            report = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            last = times[-max(1, len(times) // 10) :]
            print(
                f"{len(times)},{len(planned)},{1e3 * np.median(times):.3f},"
                f"{1e3 * np.median(last):.3f},{used / len(times):.0f},{report:.1f},"
                f"{page.stat().st_size / 1000:.0f},{peak:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
