"""What the benchmarks share: side-by-side timing, a long CSV with the machine in each row, a table.

Every benchmark is a program: `--quick` ends in under 50 seconds on two cores, `--json` prints the
rows for machines, and the last line is `RESULT name=value ...`.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memvec.environment import environment

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on two cores")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--model", default="pocket", help="Hub id, folder or 'pocket'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    return parser


def interleaved(
    works: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work in each round; works take turns, so that drift hits all alike."""
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


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the 10th and 90th percentile (the extremes below ten values)."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return statistics.median(ordered), ordered[tenth], ordered[-1 - tenth]


def report(
    name: str, rows: list[dict[str, Any]], options: argparse.Namespace, **result: float
) -> None:
    """Print a table (or JSON), write the long CSV, and end with the RESULT line."""
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
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        Console(width=140).print(table)
        print(f"{path.name} has {len(full)} rows: {machine}", file=sys.stderr)
    print("RESULT " + " ".join(f"{key}={value:.4g}" for key, value in result.items()))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
