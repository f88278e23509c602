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

import numpy as np
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


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, mean with its 95 % interval (percentile bootstrap), median, 10th and 90th percentile."""
    data = np.asarray(values, dtype=float)
    means = data[_picks(len(data))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    median, tenth, ninetieth = median_and_spread(list(values))
    return {
        "n": len(data),
        "mean": float(data.mean()),
        "low": float(low),
        "high": float(high),
        "median": median,
        "p10": tenth,
        "p90": ninetieth,
    }


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of two means over the same passages, with its 95 % paired bootstrap interval.

    Infinite where the second mean is 0.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    picks = _picks(len(a))
    return _ratio(a, b, a[picks].mean(1), b[picks].mean(1))


def ratio_of_separate_means(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The same for means over different passages, drawn independently of each other."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return _ratio(x, y, x[_picks(len(x))].mean(1), y[_picks(len(y), seed=1)].mean(1))


def _ratio(a: Any, b: Any, means_a: Any, means_b: Any) -> tuple[float, float, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(means_a / means_b, nan=1.0, posinf=np.inf)
        low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
        return float(a.mean() / b.mean()), float(low), float(high)


def _picks(n: int, draws: int = 10_000, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(n, size=(draws, n))


def save_figure(path: Path, draw: Callable[[Any], None], panels: int) -> None:
    """A row of panels as SVG and PNG; `draw` gets the axes. Ends the program without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install 'memvec[benchmarks]'.") from None
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
    shown: list[dict[str, Any]] | None = None,
    **result: float,
) -> None:
    """Print a table of `shown` rows (all; as JSON all), write the long CSV, end with RESULT."""
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
        shown = rows if shown is None else shown
        for column in shown[0]:
            table.add_column(column, justify="right")
        for row in shown:
            table.add_row(*(_cell(value) for value in row.values()))
        Console(width=140).print(table)
        print(f"{path.name} has {len(full)} rows: {machine}", file=sys.stderr)
    print("RESULT " + " ".join(f"{key}={value:.4g}" for key, value in result.items()))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
