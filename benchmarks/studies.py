"""Does a study stay as fast when it grows? Synthetic rows are put into a store and reported.

    python benchmarks/studies.py 100 1000 10000 100000
    python benchmarks/studies.py --quick

No model is loaded. The table has a row for each size (number of rows; above 1000 it is rounded down
to a multiple of 1000): the median milliseconds until a row is on the disk, of all rows and of the
last tenth (equal medians mean that a row takes no longer in a larger study), the part of it that is
waiting for the disk, processor time, bytes per row, seconds until the report is written (tables and
page, without matplotlib figures), the size of the page, and the peak memory of the process so far.

RESULT has the figures of the largest size, and `times_the_smallest`: the processor time of a row
there divided by that at the smallest size. `--quick` has sizes up to 4000.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import arguments, report
from memvec.cli.program import run_program
from memvec.errors import MemvecError
from memvec.lab.report.report import write_report
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.cells import expand
from memvec.lab.study.row import Row, StoreEntry, Text
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.passages.passage import Passage

D, T, PASSAGES = 64, 24, 250  # width, tokens of a passage, largest number of passages of a cell
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
    """A row with random figures."""
    bits = rng.uniform(40, 300)
    mem_bits = max(0.0, bits - 120) + rng.uniform(0, 3)
    horizon = int(rng.integers(1, T + 1))
    return StoreEntry(
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
            mem_bits=mem_bits,
            information_gain=bits - mem_bits,
            token_gain=horizon,
            lm_right=0,
            horizon_gain=bits - mem_bits,
            horizon_token_gain=horizon,
            steps=100,
            spent=2400,
            seconds=0.1,
            start_rule="vectors",
            batch_size=8,
            worker="synthetic",
            extra={},
        ),
        torch.ones(1, D),
        torch.zeros(4, T),
    )


def measure(size: int) -> dict[str, float]:
    """Put about `size` rows into a store and report it: the row of the table.

    Raises MemvecError if a size is smaller than the four cells.
    """
    if size < 4:
        raise MemvecError(f"{size} rows are too few: give sizes of at least 4.")
    passages = min(size // 4, PASSAGES)
    seeds = list(range(size // (4 * passages)))
    planned = expand(parse_spec(SPEC.format(seeds=seeds, passages=passages), "synthetic"))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder), write=True) as store:
        store.plan(planned, {"random-tokens"}, {"name": "synthetic"})
        store.set_environment({})
        texts = [
            (
                f"p{i}",
                SourcedPassage(i, Passage((i + 1,) * T), "synthetic"),
                Text(b"word " * T, ["w"] * T),
            )
            for i in range(passages)
        ]
        store.put_passages(planned[0].cell.key, texts)
        description = {"name": "synthetic", "revision": None, "config": "c", "weights": "w"}
        description |= {"probe": [0.0], "dtype": "float32", "width": D, "vocabulary": 4096}
        times, waits = [], []
        for planned_cell in planned:
            store.describe(planned_cell.cell.key, description)
            for number in range(passages):
                finished = row(planned_cell.cell.key, number, rng)
                start, cpu_start = time.perf_counter(), time.process_time()
                store.put(finished)
                times.append(time.perf_counter() - start)
                waits.append(times[-1] - (time.process_time() - cpu_start))
        bytes_on_disk = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        start, cpu_start = time.perf_counter(), time.process_time()
        page = write_report(Path(folder), Path(folder) / "report", figures=False).page
        report_s, report_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        last_tenth = slice(-max(1, len(times) // 10), None)
        return {
            "rows": len(times),
            "cells": len(planned),
            "ms_per_row": 1e3 * float(np.median(times)),
            "ms_last_tenth": 1e3 * float(np.median(times[last_tenth])),
            "ms_waiting": 1e3 * float(np.median(waits)),
            "cpu_ms_per_row": 1e3 * (sum(times) - sum(waits)) / len(times),
            "bytes_per_row": bytes_on_disk / len(times),
            "report_s": report_s,
            "report_cpu_s": report_cpu_s,
            "page_kB": page.stat().st_size / 1000,
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def main() -> None:
    """Measure each size."""
    parser = arguments(__doc__ or "", model=False)
    parser.add_argument(
        "sizes",
        nargs="*",
        type=int,
        help="numbers of rows, rising, at least 4; default: 100 1000 10000",
    )
    options = parser.parse_args()
    sizes = options.sizes or ([100, 1000, 4000] if options.quick else [100, 1000, 10_000])
    rows = [measure(size) for size in sizes]
    report(
        "studies",
        rows,
        options,
        largest=rows[-1]["rows"],
        cpu_ms_per_row=rows[-1]["cpu_ms_per_row"],
        times_the_smallest=rows[-1]["cpu_ms_per_row"] / rows[0]["cpu_ms_per_row"],
        bytes_per_row=rows[-1]["bytes_per_row"],
        report_s=rows[-1]["report_s"],
        page_kB=rows[-1]["page_kB"],
    )


if __name__ == "__main__":
    run_program(main)
