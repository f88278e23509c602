"""What a person sees: tables, one progress line, sentences. All but results go to stderr."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from memvec.cram_job import Status
from memvec.model.estimate import duration
from memvec.plan import Plan
from memvec.statistics import Mean
from memvec.vectors import MemVectors
from memvec.vectors import pretty_json as to_json

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

__all__ = ["certificate", "doctor", "inspect", "planned", "progress", "say", "summary", "to_json"]


def say(sentence: str) -> None:
    """One line on stderr."""
    err.print(sentence, style="dim", markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[Status], None]]:
    """A bar on a terminal; elsewhere a plain line every ten seconds."""
    if not err.is_terminal:
        yield _plain(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(title, total=None)
        say_expected = _once()

        def show(status: Status) -> None:
            say_expected(status.expected)
            bars.update(task, description=_line(status), completed=status.done, total=status.tokens)

        yield show


def _plain(title: str) -> Callable[[Status], None]:
    last, before = time.monotonic(), 0
    began: float | None = None
    say_expected = _once()

    def show(status: Status) -> None:
        nonlocal last, began, before
        say_expected(status.expected)
        if began is None and status.stage == "cramming":  # before it, other work
            began, before = time.monotonic(), status.done
        now = time.monotonic()
        if now - last >= PLAIN_EVERY:
            last = now
            left = ""
            if began is not None and status.done > before:
                seconds = (now - began) * (status.tokens - status.done) / (status.done - before)
                left = f", about {seconds:.0f} s left"
            say(f"{title}: {_line(status)}, {status.done}/{status.tokens} tokens{left}")

    return show


def _once() -> Callable[[str], None]:
    """Says the first sentence that is not empty."""
    said = False

    def tell(sentence: str) -> None:
        nonlocal said
        if sentence and not said:
            said = True
            say(sentence)

    return tell


def _line(status: Status) -> str:
    if status.engine is None or status.stage != "cramming":
        return status.stage
    e = status.engine
    split = f", {status.split} split" if status.split else ""
    return f"cramming {e.in_slots} passages ({e.waiting} wait{split}), horizon {e.horizon:.0f}"


def summary(mem: MemVectors, path: Path, account: Mapping[str, int]) -> None:
    """The table that ends `memvec cram`."""
    s = mem.summary()
    table = _table(f"{path}")
    _figures(table, s)
    table.add_row("bytes", _bytes(account))
    table.add_row("certificate", _verdict(s["exact"], s["exact_passages"], s["passages"]))
    out.print(table)


def planned(found: Plan, file: str, storage: str) -> None:
    """The table of `memvec plan`: every total with its 95 % interval."""
    table = _table(f"{file}: what cramming all of it will take")
    table.add_row("text", f"{found.text_bytes} bytes, {found.tokens} tokens")
    table.add_row(
        "sample",
        f"{found.sampled} passages, {found.sampled_tokens} tokens, crammed in "
        f"{found.sampled_seconds:.0f} s"
        + (f"; {found.inexact} did not become exact" if found.inexact else ""),
    )
    table.add_row("tokens per vector", _range(found.tokens_per_vector, 1))
    table.add_row("bits per vector", _range(found.bits_per_vector, 0))
    table.add_row("vectors", _range(found.vectors, 0))
    table.add_row("bytes of vectors", f"{_range(found.vector_bytes, 0)} in {storage}")
    t = found.seconds
    low, high = (duration(max(0.0, s)) for s in (t.low, t.high))
    table.add_row("time", f"{duration(t.mean)}, {low} to {high}")
    out.print(table)


def _range(found: Mean, digits: int) -> str:
    if math.isnan(found.low):
        return f"{found.mean:.{digits}f}"
    low = max(0.0, found.low)  # few passages: a symmetric interval may reach below nothing
    return f"{found.mean:.{digits}f}, {low:.{digits}f} to {found.high:.{digits}f}"


def inspect(mem: MemVectors, file: str) -> None:
    """What is in a file."""
    s, header = mem.summary(), mem.header
    table = _table(file)
    model = header.model
    table.add_row(
        "model",
        _safe(f"{model.get('name')} ({model.get('dtype')}, revision {model.get('revision')})"),
    )
    table.add_row("weights", _safe(model.get("weights"))[:16])
    names = ", ".join(d.name for d in header.documents[:3])
    more = " ..." if len(header.documents) > 3 else ""
    table.add_row("documents", f"{len(header.documents)}: {_safe(names)}{more}")
    _figures(table, s)
    table.add_row(
        "bytes",
        f"text {s['text_bytes']}, vectors {s['vector_bytes']}, edits {s['edit_bytes']}, "
        f"corrections {s['correction_bytes']}",
    )
    recipe = header.recipe
    table.add_row(
        "recipe",
        _safe(
            ", ".join(
                f"{k} {recipe[k]}"
                for k in ("objective", "temperature", "schedule", "lr")
                if k in recipe
            )
        ),
    )
    e = header.environment
    made = f"memvec {e.get('memvec')}, torch {e.get('torch')}, {e.get('date')}"
    table.add_row("made with", _safe(made))
    table.add_row(
        "text in the file", "yes" if any(d.text is not None for d in header.documents) else "no"
    )
    if header.certificate is None:
        table.add_row("certificate", "none")
    else:
        c = header.certificate
        verdict = _verdict(bool(c.get("exact")), c.get("exact_passages"), c.get("passages"))
        how = _safe(f"{c.get('decoded_in')} on {c.get('device')}, {c.get('date')}")
        table.add_row("certificate", f"{verdict}; {how}")
        if str(c.get("cache", "")).startswith("none: "):
            table.add_row("decoded", _safe(f"without a cache: {c['cache'].removeprefix('none: ')}"))
    out.print(table)


def certificate(mem: MemVectors, found: Mapping[str, Any], exact: list[bool]) -> None:
    """The table of `memvec verify`: a row for each passage, the failing ones marked."""
    table = Table(title=f"{sum(exact)} of {len(exact)} passages exact", title_justify="left")
    for column in ("passage", "tokens", "vectors", "margin", "bits", "decodes"):
        table.add_column(column, justify="right")
    shown = (
        list(range(len(exact)))
        if len(exact) <= 40
        else [i for i, e in enumerate(exact) if not e][:40]
    )
    for i in shown:
        p = mem.passages[i]
        verdict = "[green]exact[/green]" if exact[i] else "[red]WRONG[/red]"
        table.add_row(
            str(i),
            str(p.tokens),
            str(mem.vectors.shape[1]),
            f"{p.margin:.2f}",
            f"{p.information_gain:.0f}",
            verdict,
        )
    out.print(table)
    if len(exact) > len(shown):
        out.print(f"({len(exact) - len(shown)} more passages are not listed)")
    out.print(
        f"decoded freely in {found['decoded_in']} on {found['device']} "
        f"({found['attention']} attention, cache {_safe(found['cache'])}, torch {found['torch']}): "
        + _verdict(found["exact"], found["exact_passages"], found["passages"])
    )


def doctor(report: Mapping[str, Any]) -> None:
    """The findings of `memvec doctor`."""
    table = _table(f"{report['model']}")
    for check in report["checks"]:
        mark = "[green]yes[/green]" if check["ok"] else "[red]NO[/red]"
        table.add_row(check["name"], f"{mark}  {_safe(check['detail'])}")
    for name, value in report["facts"].items():
        table.add_row(name, _safe(value))
    out.print(table)
    out.print(
        "[green]This model can be crammed here.[/green]"
        if report["can_be_crammed"]
        else f"[red]This model cannot be crammed here:[/red] {_safe(report['reason'])}"
    )


def _safe(text: object) -> str:
    """A text of others: its markup is not obeyed, its control characters are not sent."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def _table(title: str) -> Table:
    table = Table(
        title=_safe(title), title_justify="left", show_header=False, box=None, padding=(0, 2)
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _figures(table: Table, s: Mapping[str, Any]) -> None:
    error = s["tokens_per_vector_error"]
    spread = "" if math.isnan(error) else f" ± {error:.1f}"
    table.add_row(
        "passages",
        f"{s['passages']}, {s['vectors_per_passage']} vectors each, D {s['width']}, {s['storage']}",
    )
    table.add_row(
        "tokens",
        f"{s['tokens']}, {s['tokens_per_vector']:.1f}{spread} per vector (n = {s['passages']})",
    )
    table.add_row(
        "information gain",
        f"{s['information_gain_bits']:.0f} bits, {s['bits_per_vector']:.0f} per vector, "
        f"{s['bits_per_dimension']:.2f} per dimension",
    )
    table.add_row(
        "utilisation",
        f"{100 * s['bit_utilisation']:.1f} % of bits, "
        f"{100 * s['token_utilisation']:.1f} % of tokens",
    )
    if s["corrections"]:
        table.add_row(
            "corrections", f"{s['corrections']} tokens listed, {s['correction_bytes']} bytes"
        )
    read = f"start rule {s['start_rule']}" if s["layout"] == "prefix" else f"read {s['layout']}"
    table.add_row("smallest margin", f"{s['margin']:.2f} logits; {read}")
    table.add_row(
        "cost", f"{s['steps']} steps, {s['spent']} forward-backward tokens, {s['seconds']:.1f} s"
    )


def _bytes(account: Mapping[str, int]) -> str:
    return (
        f"text {account['text']}, vectors {account['vectors']}; xz {account['xz']}, "
        f"zstd {account['zstd']}, arithmetic coding {account['arithmetic']}"
    )


def _verdict(exact: bool, right: Any, total: Any) -> str:
    right, total = _safe(right), _safe(total)
    if exact:
        return f"[green]exact[/green] ({right} of {total} passages decode freely)"
    return f"[red]NOT exact[/red] ({right} of {total} passages decode freely)"
