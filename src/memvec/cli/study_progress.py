"""What a person sees while a study runs: a bar on a terminal, a plain line every ten seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from memvec.cli.display import PLAIN_EVERY, err, say
from memvec.cli.expected import duration
from memvec.lab.study.run import StudyStatus


def line(status: StudyStatus) -> str:
    """Cells, passages a minute, time left, horizon, what runs now."""
    left = "" if status.left is None else f", {duration(status.left)} left"
    horizon = "" if status.horizon is None else f", horizon {status.horizon:.0f}"
    return (
        f"{status.cells_done}/{status.cells} cells, {status.rows}/{status.planned} passages, "
        f"{status.per_minute:.0f} a minute{left}{horizon} · {status.what}"
    )


@contextlib.contextmanager
def study_progress(name: str) -> Iterator[Callable[[StudyStatus], None]]:
    """Show the progress of a study."""
    if not err.is_terminal:
        last = time.monotonic()

        def plain(status: StudyStatus) -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_EVERY:
                last = time.monotonic()
                say(f"{name}: {line(status)}")

        yield plain
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(name, total=None)

        def show(status: StudyStatus) -> None:
            bars.update(task, description=line(status), completed=status.rows, total=status.planned)

        yield show
