"""What a person sees: tables and sentences. All but results go to stderr."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memvec.cli.expected import number_of
from memvec.cramming.recipe import Recipe
from memvec.errors import printable
from memvec.vectors import MemVectors

MAX_ROWS = 40  # passages that a certificate lists
MAX_NAMES = 3  # documents that are named
ALWAYS_SHOWN = ("objective", "temperature", "schedule", "lr", "margin")  # fields of a recipe

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(sentence: str) -> None:
    """Print one line on stderr."""
    err.print(printable(sentence), style="dim", markup=False, soft_wrap=True)


def model(description: Mapping[str, Any]) -> None:
    """Print on stderr which model runs, and how: D, V, dtype, device, attention, encoder.

    `description` is that of `FrozenLM.description`.
    """
    d = description
    few_bits = f", quantized to {d['quantize']}" if d.get("quantize") else ""
    say(
        f"{d['name']}: D {d['width']}, V {d['vocabulary']}, {d['dtype']}{few_bits} on "
        f"{d['device']}, {d['attention']} attention, one-pass encoder: "
        f"{'yes' if d['encoder'] else 'no'}"
    )


def summary(mem: MemVectors, path: Path, byte_counts: Mapping[str, int]) -> None:
    """Print the table that ends `memvec cram`; `byte_counts` are those of `common.account`."""
    s = mem.summary()
    table = facts_table(f"{path}")
    _add_figures(table, s)
    table.add_row("bytes", _bytes(byte_counts))
    table.add_row("certificate", _verdict(s["exact"], s["exact_passages"], s["passages"]))
    out.print(table)


def inspect(mem: MemVectors, file: str) -> None:
    """Print what a file holds. Strings of the file are printed without their markup."""
    s, header, made_by = mem.summary(), mem.header, mem.header.model
    table = facts_table(file)
    how = f", revision {r}" if (r := made_by.get("revision")) is not None else ""
    how += f", quantized to {bits}" if (bits := made_by.get("quantize")) is not None else ""
    table.add_row("model", safe(f"{made_by.get('name')} ({made_by.get('dtype')}{how})"))
    table.add_row("weights", safe(made_by.get("weights"))[:16])
    names = ", ".join(d.name for d in header.documents[:MAX_NAMES])
    more = " ..." if len(header.documents) > MAX_NAMES else ""
    table.add_row("documents", f"{len(header.documents)}: {safe(names)}{more}")
    _add_figures(table, s)
    table.add_row(
        "bytes",
        f"text {s['text_bytes']}, vectors {s['vector_bytes']}, edits {s['edit_bytes']}, "
        f"corrections {s['correction_bytes']}",
    )
    table.add_row("recipe", safe(_recipe(header.recipe)))
    e = header.environment
    versions = f"memvec {e.get('memvec')}, torch {e.get('torch')}, {e.get('date')}"
    table.add_row("made with", safe(versions))
    has_text = any(d.text is not None for d in header.documents)
    table.add_row("text in the file", "yes" if has_text else "no")
    _add_certificate(table, header.certificate)
    out.print(table)


def _recipe(recipe: Mapping[str, Any]) -> str:
    """The fields of a recipe that say most about it, and all others that are not the default's.

    Temperature and margin have their unit.
    """
    defaults = {field.name: field.default for field in fields(Recipe)}
    parts = []
    for name in (*ALWAYS_SHOWN, *sorted(defaults.keys() - {*ALWAYS_SHOWN, "unit"})):
        value = recipe.get(name)
        if value is None or (name not in ALWAYS_SHOWN and value == defaults[name]):
            continue
        in_logits = name in ("temperature", "margin") and recipe.get("unit") == "logits"
        if in_logits and isinstance(value, float):  # a file may claim anything
            value = f"{value:.3g} logits"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def _add_certificate(table: Table, certificate: Mapping[str, Any] | None) -> None:
    if certificate is None:
        table.add_row("certificate", "none")
        return
    c = certificate
    verdict = _verdict(bool(c.get("exact")), c.get("exact_passages"), c.get("passages"))
    how = safe(f"{c.get('decoded_in')} on {c.get('device')}, {c.get('date')}")
    table.add_row("certificate", f"{verdict}; {how}")
    cache = str(c.get("cache", ""))
    if cache.startswith("none: "):
        table.add_row("decoded", safe(f"without a cache: {cache.removeprefix('none: ')}"))


def certificate(mem: MemVectors, figures: Mapping[str, Any], exact: list[bool]) -> None:
    """Print the table of `memvec verify`: a row per passage; of many passages only what fails.

    `figures` is the certificate of `certificate.certificate_of`, `exact` one flag per passage.
    """
    crammed = ("when crammed: margin, logits", "when crammed: gain, bits")
    columns = ("passage", "tokens", "vectors", *crammed, "decodes")
    table = columns_table(f"{sum(exact)} of {len(exact)} passages exact", columns)
    listed = list(range(len(exact)))
    if len(exact) > MAX_ROWS:
        listed = [i for i in listed if not exact[i]][:MAX_ROWS]
    for i in listed:
        p = mem.passages[i]
        table.add_row(
            str(i),
            str(p.tokens),
            str(mem.vectors.shape[1]),
            f"{p.margin:.2f}",
            f"{p.information_gain:.0f}",
            "[green]exact[/green]" if exact[i] else "[red]WRONG[/red]",
        )
    out.print(table)
    if len(exact) > len(listed):
        out.print(f"({len(exact) - len(listed)} more passages are not listed)")
    c = figures
    if "decoded_by" in c:
        how = f"by {safe(c['decoded_by'])}"
    else:
        none, _, reason = str(c["cache"]).partition(": ")
        cache = f"without a cache ({reason})" if none == "none" else "with a cache"
        how = f"on {c['device']} ({c['attention']} attention, {safe(cache)}, torch {c['torch']})"
    out.print(
        f"decoded freely in {c['decoded_in']} {how}: "
        + _verdict(c["exact"], c["exact_passages"], c["passages"])
    )


def doctor(report: Mapping[str, Any]) -> None:
    """Print the report of `memvec.lab.doctor.examine`: its checks, its facts and its verdict."""
    table = facts_table(f"{report['model']}")
    for check in report["checks"]:
        mark = "[green]yes[/green]" if check["ok"] else "[red]NO[/red]"
        table.add_row(check["name"], f"{mark}  {safe(check['detail'])}")
    for name, value in report["facts"].items():
        table.add_row(name, safe(value))
    out.print(table)
    out.print(
        "[green]This model can be crammed here.[/green]"
        if report["can_be_crammed"]
        else f"[red]This model cannot be crammed here:[/red] {safe(report['reason'])}"
    )


def safe(text: object) -> str:
    """Text from outside, escaped: no markup, and no control characters for the terminal."""
    return escape(printable(str(text)))


def facts_table(title: str) -> Table:
    """An empty table of names and values."""
    table = Table(
        title=safe(title), title_justify="left", show_header=False, box=None, padding=(0, 2)
    )
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def columns_table(title: str, columns: Iterable[str], left: str = "") -> Table:
    """An empty table of numbers, which end at the right; `left` is a column of words."""
    table = Table(title=safe(title), title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == left else "right")
    return table


def _add_figures(table: Table, s: Mapping[str, Any]) -> None:
    error = s["tokens_per_vector_error"]
    spread = "" if math.isnan(error) else f", standard error {error:.1f}"
    table.add_row(
        "passages",
        f"{s['passages']}, {number_of(s['vectors_per_passage'], 'vector')} each, {_size(s)}, "
        f"{s['storage']}",
    )
    table.add_row(
        "tokens",
        f"{s['tokens']}, {s['tokens_per_vector']:.1f} per vector (n = {s['passages']}{spread})",
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
    read += ", BOS in front" if s["front"] == "bos" else ""
    read += f", soft tokens of {s['trigger_bytes']} bytes" if s["trigger_bytes"] else ""
    table.add_row("smallest margin", f"{s['margin']:.2f} logits; {read}")
    table.add_row(
        "cost",
        f"{number_of(s['steps'], 'step')}, {number_of(s['spent'], 'forward-backward token')}, "
        f"{s['seconds']:.1f} s",
    )


def _size(summary: Mapping[str, Any]) -> str:
    """Numbers of a vector, and where they stand if they are no input."""
    if summary["space"] == "inputs":
        return f"D {summary['width']}"
    return f"{summary['width']} numbers (space {summary['space']})"


def _bytes(counts: Mapping[str, int]) -> str:
    return (
        f"text {counts['text']}, vectors {counts['vectors']}; xz {counts['xz']}, "
        f"zstd {counts['zstd']}, arithmetic coding {counts['arithmetic']}"
    )


def _verdict(exact: bool, right: Any, total: Any) -> str:
    right, total = safe(right), safe(total)
    if exact:
        return f"[green]exact[/green] ({right} of {total} passages decode freely)"
    return f"[red]NOT exact[/red] ({right} of {total} passages decode freely)"


def failures(mem: MemVectors) -> Iterable[str]:
    """A sentence for each passage that is not exact."""
    for i, p in enumerate(mem.passages):
        if not p.exact:
            why = {
                "done": "its decoding disagrees",
                "budget": f"it was given up at step {p.steps}",
                "not-finite": "the loss was not finite",
            }[p.status]
            yield (
                f"passage {i} ({p.tokens} tokens) came back only up to token {p.horizon}: {why}."
            )
