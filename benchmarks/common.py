"""What the benchmarks share: options, side-by-side timing, a table, a CSV file and the RESULT line.

Every benchmark is a program. `--quick` ends in under 50 seconds on two idle cores. The program
prints a table, writes its rows to OUT/NAME.csv with the machine and the versions in each row, and
prints a last line `RESULT name=value ...`. `--json` prints the rows as JSON instead of the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from memvec.machine import environment
from memvec.statistics import bootstrap_mean, median_and_spread

RESULTS = Path(__file__).parent / "results"


class HelpWithDefaults(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Keeps the lines of the description, and adds the default to the help of an option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], ()) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def arguments(description: str, *, model: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; --model only with `model`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpWithDefaults)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small run (see above), under 50 seconds on two idle cores",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the rows as JSON instead of the table"
    )
    if model:
        parser.add_argument("--model", default="pocket", help="Hub id, folder or 'pocket'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    return parser


def clock() -> float:
    """Seconds of a clock; only the difference of two calls has a meaning.

    If a CPU computes in one thread (OMP_NUM_THREADS=1), the clock is the processor time of this
    process, so that the time of other processes does not count. Otherwise it is the wall clock.
    """
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return time.perf_counter()
    return time.process_time()


def interleaved(
    works: dict[str, Callable[[], Any]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, after `warmup` calls that do not count.

    The functions take turns, so that a slow change of the machine's speed affects all equally.
    """
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
    """n, mean, ends of its 95 % interval (percentile bootstrap), median, 10th, 90th percentile."""
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
    """An estimate and the two ends of its interval, by their names in the RESULT line."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def save_figure(path: Path, draw: Callable[[Any], None], panels: int) -> None:
    """Write a row of `panels` panels as SVG and PNG; `draw` gets their axes.

    Without matplotlib, a line on stderr says that there is no figure.
    """
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib, pip install '.[benchmarks]'", file=sys.stderr)
        return
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

    With --json all `rows` are printed as JSON instead of the table. A figure that is not a number
    (NaN) is a dash in the table, empty in the CSV, null in JSON, and left out of RESULT.
    """
    where = environment()
    machine = {
        "machine": where["gpu"] or platform.processor() or where["machine"],
        **{key: where[key] for key in ("threads", "torch", "transformers", "memvec", "date")},
    }
    full = [{"benchmark": name, **_without_nan(row), **machine} for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for r in full for k in r)))
        writer.writeheader()
        writer.writerows(full)
    if options.json:
        # JSON has no infinite numbers.
        finite = [
            {key: None if value in (math.inf, -math.inf) else value for key, value in row.items()}
            for row in full
        ]
        print(json.dumps(finite, indent=1, allow_nan=False))
    else:
        table = Table(title=name, title_justify="left")
        table_rows = rows if table_rows is None else table_rows
        for column in table_rows[0]:
            table.add_column(column, justify="right")
        for row in table_rows:
            table.add_row(*(_cell(value) for value in row.values()))
        # As wide as the table, so that no name or figure is cut off.
        wide = Console(width=10_000)
        width = Measurement.get(wide, wide.options, table).maximum
        Console(width=width).print(table)
        where_run = ", ".join(f"{key} {value}" for key, value in machine.items())
        print(f"{path} has {len(full)} rows ({where_run})", file=sys.stderr)
    print("RESULT " + " ".join(f"{k}={v:.4g}" for k, v in result.items() if not math.isnan(v)))


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None in the place of NaN, which JSON does not have."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def _cell(value: Any) -> str:
    """The text of a value in the table."""
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
