"""What a person sees of long work: a bar on a terminal, else a plain line every ten seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memvec.cli.display import err, say
from memvec.cli.expected import duration, number_of, sentence

if TYPE_CHECKING:
    from memvec.cram_job import CramStatus
    from memvec.lab.study.run import StudyStatus

PLAIN_EVERY = 10.0  # seconds between plain lines


def timer() -> Callable[[], bool]:
    """A function that is true when a plain line is due: PLAIN_EVERY seconds after the last one."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < PLAIN_EVERY:
            return False
        last = time.monotonic()
        return True

    return due


@contextlib.contextmanager
def cram_progress(title: str, workers: int = 0) -> Iterator[Callable[[CramStatus], None]]:
    """Yields a function that shows a status of cramming, here or in `workers` workers.

    It prints what cramming will take as soon as that is known, and at the end how many passages
    were cut in half, which no cost of the result counts.
    """
    split, expected = 0, None
    with _shown(title) as show:

        def show_and_say(status: CramStatus) -> None:
            nonlocal split, expected
            split = status.split
            if status.expected and not expected:
                expected = status.expected
                say(sentence(expected, workers))
            show(status)

        yield show_and_say
    if split:
        some = number_of(split, "passage")
        say(f"Cut in half because it was not exact: {some}. The cost counts the halves only.")


@contextlib.contextmanager
def _shown(title: str) -> Iterator[Callable[[CramStatus], None]]:
    if not err.is_terminal:
        yield _plain_lines(title)
        return
    with _bars() as bars:
        task = bars.add_task(title, total=None)
        yield lambda status: bars.update(
            task, description=_cram_line(status), completed=status.done, total=status.tokens
        )


def _bars() -> Progress:
    """Bars with their share in percent, the time so far and the time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def _plain_lines(title: str) -> Callable[[CramStatus], None]:
    """A function that prints plain lines, with the time left at the rate so far."""
    due = timer()
    cramming_since: float | None = None
    done_before = 0  # tokens that an earlier run finished

    def show(status: CramStatus) -> None:
        nonlocal cramming_since, done_before
        if cramming_since is None and status.stage == "cramming":  # before it, other work
            cramming_since, done_before = time.monotonic(), status.done
        if not due():
            return
        left, done = "", status.done - done_before
        if cramming_since is not None and done > 0:
            seconds = (time.monotonic() - cramming_since) * (status.tokens - status.done) / done
            left = f", about {seconds:.0f} s left"
        say(f"{title}: {_cram_line(status)}, {status.done}/{status.tokens} tokens{left}")

    return show


def _cram_line(status: CramStatus) -> str:
    if status.stage in ("cutting", "certifying"):
        return f"{status.stage} ({status.share:.0%})"
    e = status.engine
    if e is None or status.stage not in ("measuring", "cramming"):
        return status.stage
    split = f", {status.split} cut in half" if status.split else ""
    passages = number_of(e.in_slots, "passage")
    waiting = f"({e.waiting} waiting{split})"
    return f"{status.stage} {passages} {waiting}, mean horizon {e.horizon:.0f}"


@contextlib.contextmanager
def decoding_progress(title: str) -> Iterator[Callable[[float], None]]:
    """Yields a function that shows the share of the passages that is decoded."""
    if err.is_terminal:
        with _bars() as bars:
            task = bars.add_task(f"{title}: decoding", total=1.0)
            yield lambda share: bars.update(task, completed=share)
        return
    due, began = timer(), time.monotonic()

    def plain(share: float) -> None:
        if due():
            left = (time.monotonic() - began) * (1 - share) / share
            say(f"{title}: decoding ({share:.0%}), about {left:.0f} s left")

    yield plain


@contextlib.contextmanager
def study_progress(name: str) -> Iterator[Callable[[StudyStatus], None]]:
    """Yields a function that shows a status of a study."""
    if not err.is_terminal:
        due = timer()

        def plain(status: StudyStatus) -> None:
            if due():
                say(f"{name}: {_study_line(status)}")

        yield plain
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda status: bars.update(
            task, description=_study_line(status), completed=status.rows, total=status.planned
        )


def _study_line(status: StudyStatus) -> str:
    """Cells, passages a minute, time left, horizon, what runs now."""
    left = "" if status.left is None else f", {duration(status.left)} left"
    horizon = "" if status.horizon is None else f", horizon {status.horizon:.0f}"
    return (
        f"{status.cells_done}/{status.cells} cells, {status.rows}/{status.planned} passages, "
        f"{status.per_minute:.0f} a minute{left}{horizon} · {status.what}"
    )
