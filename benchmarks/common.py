"""What the benchmarks share: side-by-side timing, a long CSV with the machine in each row, a table.

Every benchmark is a program: `--quick` ends in under 50 seconds on two cores, `--json` prints the
rows for machines, and the last line is `RESULT name=value ...`.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memvec.errors import MemvecError
from memvec.machine import environment
from memvec.statistics import bootstrap_mean, median_and_spread

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on two cores")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--model", default="pocket", help="Hub id, folder or 'pocket'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    return parser


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; what memvec refuses is one sentence and exit code 2, as in the command."""
    try:
        main()
    except MemvecError as error:
        print(f"memvec: {error}", file=sys.stderr)
        sys.exit(2)


def clock() -> float:
    """A clock for differences, in seconds.

    Where a CPU computes in one thread (OMP_NUM_THREADS=1), it is the processor time of this
    process, so that other processes do not count; elsewhere it is the wall clock.
    """
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return time.perf_counter()
    return time.process_time()


def interleaved(
    works: dict[str, Callable[[], Any]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each function in each round; they take turns, so that drift affects all alike."""
    for _ in range(warmup):
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds):
        order = list(works) if i % 2 == 0 else list(works)[::-1]
        for name in order:
            _wait()
            began = time.perf_counter()
            works[name]()
            _wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, mean with its 95 % interval (percentile bootstrap), median, 10th and 90th percentile."""
    mean, low, high = bootstrap_mean(values)
    median, tenth, ninetieth = median_and_spread(values)
    return {
        "n": len(values),
        "mean": mean,
        "low": low,
        "high": high,
        "median": median,
        "p10": tenth,
        "p90": ninetieth,
    }


def with_ends(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """An estimate and the ends of its interval, by the names of a RESULT line."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def save_figure(path: Path, draw: Callable[[Any], None], panels: int) -> None:
    """A row of panels as SVG and PNG; `draw` gets the axes. Ends the program without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install '.[benchmarks]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(4.2 * panels, 3.6), squeeze=False)
    draw(axes[0])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".svg", ".png"):
        figure.savefig(path.with_suffix(ending), dpi=150)
    pyplot.close(figure)


def report(
    name: str,
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
    table_rows: list[dict[str, Any]] | None = None,
    **result: float,
) -> None:
    """Print `table_rows` (default: `rows`) as a table, write `rows` as CSV, and print RESULT.

    With --json all `rows` are printed as JSON instead of the table.
    """
    where = environment()
    machine = {
        "machine": where["gpu"] or platform.processor() or where["machine"],
        **{key: where[key] for key in ("threads", "torch", "transformers", "memvec", "date")},
    }
    full = [{"benchmark": name, **row, **machine} for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for r in full for k in r)))
        writer.writeheader()
        writer.writerows(full)
    if options.json:
        print(json.dumps(full, indent=1))
    else:
        table = Table(title=name, title_justify="left")
        table_rows = rows if table_rows is None else table_rows
        for column in table_rows[0]:
            table.add_column(column, justify="right")
        for row in table_rows:
            table.add_row(*(_cell(value) for value in row.values()))
        Console(width=140).print(table)
        print(f"{path.name} has {len(full)} rows: {machine}", file=sys.stderr)
    print("RESULT " + " ".join(f"{key}={value:.4g}" for key, value in result.items()))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
