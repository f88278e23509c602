"""docs/engines.md from the cells of benchmarks/engines.py, which the page calls combinations."""

from __future__ import annotations

import platform
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOTES = Path(__file__).parent / "engines_notes.md"
# Below this lead, in standard deviations of the logits, rounding to bfloat16 has changed answers.
TIE = 0.3
Row = dict[str, Any]
HEAD = """# Engines

Written by `make engines` (`benchmarks/engines.py`) from the results of all its runs so far. Each
engine ran in its own environment, greedily, on the CPU ({machine}), and its token ids were compared
with the hashes of what was crammed, or, for questions that follow usable vectors, with memvec's own
answers. **{exact} of {cells} combinations are exact ({share:.1f} %)**, {passages}.

A combination is one engine, model, dtype, number of vectors K, start rule and way of asking, with
up to 16 passages. Models: {models}; all but `pocket`, the built-in one, are random and tiny. K:
{Ks}. Start rules: {rules}; *use* is four questions after the usable vectors of each of four
passages. A passage with the model's EOS is in {eos} of the {decoding} combinations that decode
passages. Only passages that memvec itself certified are asked for: {left_out} of {attempted} were
not exact and are left out.
"""


def page(rows: list[Row], planned: dict[str, list[str]]) -> str:
    """The text of the page.

    `planned`: engine → its ways of asking. Those without a cell are listed.
    """
    parts = [_head(rows), _by_way(rows), _by_model(rows), _not_run(rows, planned), _not_exact(rows)]
    return "\n".join([*(part for part in parts if part), NOTES.read_text(encoding="utf-8")])


def _head(rows: list[Row]) -> str:
    decoding = [row for row in rows if row["rule"] != "use"]
    # Every engine is asked for the same passages, so that those of one of them count.
    files = {(r["model"], r["dtype"], r["K"], r["rule"]): r["passages"] for r in decoding}
    exact = sum(is_exact(row) for row in rows)
    text = HEAD.format(
        machine=platform.machine(),
        exact=exact,
        cells=len(rows),
        share=100 * exact / max(1, len(rows)),
        passages=f"{sum(r['exact'] for r in rows)} of {sum(r['passages'] for r in rows)} answers",
        models=", ".join(_distinct(row["model"] for row in rows)),
        Ks=", ".join(str(K) for K in sorted({row["K"] for row in decoding})),
        rules=", ".join(f"*{rule}*" for rule in _distinct(row["rule"] for row in decoding)),
        eos=sum(row["eos"] for row in decoding),
        decoding=len(decoding),
        left_out=16 * len(files) - sum(files.values()),
        attempted=16 * len(files),
    )
    wrapped = [textwrap.fill(part, 100, break_on_hyphens=False) for part in text.split("\n\n")]
    return "\n\n".join(wrapped) + "\n"


def is_exact(row: Row) -> bool:
    """Whether a cell is exact: the engine ran, and every answer is right."""
    return not row["why"] and row["exact"] == row["passages"]


def _by_way(rows: list[Row]) -> str:
    lines = [
        "## Ways of asking",
        "",
        "| engine | way | float32 | bfloat16 | answers exact |",
        "|---|---|---|---|---|",
    ]
    for engine, way in _distinct((row["engine"], row["way"]) for row in rows):
        cells = [row for row in rows if (row["engine"], row["way"]) == (engine, way)]
        by_dtype = [
            _share(row for row in cells if row["dtype"] == d) for d in ("float32", "bfloat16")
        ]
        answers = f"{sum(row['exact'] for row in cells)} of {sum(row['passages'] for row in cells)}"
        lines.append(f"| {_version(rows, engine)} | {way} | {' | '.join(by_dtype)} | {answers} |")
    return "\n".join([*lines, ""])


def _by_model(rows: list[Row]) -> str:
    models = _distinct(row["model"] for row in rows)
    lines = [
        "## Models",
        "",
        "Combinations that are exact, of both dtypes and all ways.",
        "",
        f"| engine | {' | '.join(models)} |",
        f"|---|{'---|' * len(models)}",
    ]
    for engine in _distinct(row["engine"] for row in rows):
        shares = [
            _share(row for row in rows if (row["engine"], row["model"]) == (engine, model))
            for model in models
        ]
        lines.append(f"| {engine} | {' | '.join(shares)} |")
    return "\n".join([*lines, ""])


def _not_run(rows: list[Row], planned: dict[str, list[str]]) -> str:
    """The planned engines without a cell, and the models, dtypes and ways that others lack."""
    models = _distinct(row["model"] for row in rows)
    lines = []
    for engine, ways in planned.items():
        cells = [row for row in rows if row["engine"] == engine]
        if not cells:
            lines.append(f"- {engine}: none.")
            continue
        planned_values = {"model": models, "dtype": ["float32", "bfloat16"], "way": ways}
        missing = [
            f"{kind} {value}"
            for kind, values in planned_values.items()
            for value in values
            if value not in {row[kind] for row in cells}
        ]
        if missing:
            lines.append(f"- {engine}: {', '.join(missing)}.")
    return "\n".join(["Of these, no combination was run:", "", *lines, ""]) if lines else ""


def _share(rows: Iterable[Row]) -> str:
    """'exact of cells'; 'refused' where memvec did not start the engine; '–' where nothing ran."""
    cells = list(rows)
    if not cells:
        return "–"
    if all(row["why"] for row in cells):
        return "refused" if all(refused(row) for row in cells) else "failed"
    return f"{sum(is_exact(row) for row in cells)} of {len(cells)}"


def refused(row: Row) -> bool:
    """Whether memvec refused the model before the engine started."""
    return bool(row["why"]) and "did not generate" not in row["why"]


def _version(rows: list[Row], engine: str) -> str:
    """The engine's name and release as the engine reports them, joined if there are several."""
    versions = [row["version"] for row in rows if row["engine"] == engine and row["version"]]
    name = "; ".join(_distinct(versions)) or engine
    return f"{name}, server" if engine.endswith("-server") else name


def _not_exact(rows: list[Row]) -> str:
    wrong_rows = [row for row in rows if not is_exact(row)]
    if not wrong_rows:
        return ""
    counts: dict[str, int] = {}
    for row in wrong_rows:
        text = f"{row['engine']}, {row['model']}, {row['dtype']}"
        text += f": {row['why']}" if row["why"] else _errors(row)
        counts[text] = counts.get(text, 0) + 1
    lines = [f"- {text}" + (f" ({n} combinations)" if n > 1 else "") for text, n in counts.items()]
    return "\n".join(["## Combinations that are not exact, and why", "", *lines, ""])


def _errors(row: Row) -> str:
    """What is wrong in a cell, and the cause if the leads of the right tokens show it."""
    leads = [float(re.findall(r"by (-?[\d.]+)$", error)[0]) for error in row["errors"]]
    text = f", K = {row['K']}, {row['rule']}, {row['way']}: {row['exact']} of {row['passages']}; "
    leads_text = " to ".join(dict.fromkeys(f"{lead:.3f}" for lead in (min(leads), max(leads))))
    text += (
        f"where they part, the right token leads by {leads_text} standard deviations of the logits"
    )
    if row["dtype"] == "bfloat16" and max(leads) < TIE:
        return f"{text}: bfloat16 rounds such ties otherwise in each engine."
    return f"{text}: this is no tie, and the cause is not known."


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
