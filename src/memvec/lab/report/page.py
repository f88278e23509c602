"""One self-contained HTML page: no network, light and dark, narrow and wide.

All numbers are embedded as JSON; a small script draws the figures as SVG, with values on hover. The
template is `page.html` beside this file.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from memvec import __version__
from memvec.errors import MemvecError
from memvec.lab.report.contents import all_cards
from memvec.lab.report.data import Data, short
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.statistics import mean_interval
from memvec.writing import write_atomically

EXPLORED = 48  # passages in the explorer
MAX_CARDS = 9
SPECTRUM = 96  # points of a vector's spectrum
MAX_TOKENS = 400  # shown of a passage


def write_page(data: Data, tables: list[Table], plots: list[Plot], target: Path) -> Path:
    """Write the page to `target` and return the path."""
    template = files("memvec.lab.report").joinpath("page.html").read_text("utf-8")
    content = {
        "name": data.name,
        "about": data.about,
        "version": __version__,
        "overview": overview(data),
        "plots": [asdict(p) for p in plots],
        "tables": [{**asdict(t), "shown": t.shown()} for t in tables],
        "cells": cell_rows(data),
        "passages": explored(data),
        "reproduce": reproduce(data),
    }
    # Inside a script element, "</script" ends it and "<!-- <script" keeps its end from ending it.
    text = json.dumps(_clean(content), ensure_ascii=False).replace("<", "\\u003c")
    title = data.name.replace("&", "&amp;").replace("<", "&lt;")
    html = template.replace("__TITLE__", title).replace('"__DATA__"', text)
    write_atomically(target, html.encode("utf-8", "replace"))
    return target


def overview(data: Data) -> list[dict[str, str]]:
    """The cards at the top of the page: a value and a label each."""
    rows = data.rows
    cards = [
        {
            "value": f"{len(rows)} of {data.planned}",
            "label": f"passages crammed, {rows['cell'].nunique()} cells, "
            f"{rows['model'].nunique()} model(s)",
        }
    ]
    cards += [card._asdict() for card in all_cards(data)]
    return cards[:MAX_CARDS]


def cell_rows(data: Data) -> list[list[Any]]:
    """One line per cell for the sortable table."""
    keys = ["protocol", "model", "series", "length", "vectors", "seed"]
    lines = []
    for key, g in data.rows.groupby([*keys, "cell"], sort=False):
        horizon = mean_interval(g["horizon"].tolist())
        lines.append(
            [
                key[0],
                str(key[1]),
                *(_number(k) for k in key[2:6]),
                len(g),
                round(horizon.mean, 2),
                round(float(g["accuracy"].mean()), 4),
                round(float(g["lm_bits"].mean()), 1),
                round(float(g["mem_bits"].mean()), 2),
                round(float(g["information_gain"].mean()), 1),
                round(float(g["token_gain"].mean()), 2),
                round(float(g["seconds"].sum()), 1),
            ]
        )
    return lines


def explored(data: Data) -> list[dict[str, Any]]:
    """Passages for the explorer, spread over the cells."""
    rows = data.rows
    order = rows.groupby("cell", sort=False).cumcount().to_numpy()
    picked = rows.iloc[np.argsort(order, kind="stable")[:EXPLORED]]
    passages = []
    for row in picked.to_dict("records"):
        try:
            vectors, positions = data.store.tensors(row["cell"], row["number"])
        except MemvecError:
            continue  # the row's numbers are valid; its vectors file is gone
        passages.append(_explored(data, row, vectors.float().numpy(), positions.numpy()))
    return passages


def _explored(data: Data, row: dict[str, Any], vectors: Any, positions: Any) -> dict[str, Any]:
    """One passage: vectors (K, D), positions (4, N) as the store keeps them."""
    passage = data.store.passage(row["cell"], row["number"])
    name, ids = passage.name, passage.ids
    pieces = passage.pieces or [str(i) for i in ids]
    given = len(ids) - positions.shape[1]
    lm_bits, bits, margin, lm_margin = (
        [round(float(v), 2) for v in line[:MAX_TOKENS]] for line in positions
    )
    return {
        "title": f"{row['protocol']} · {row['model']} · {name}",
        "K": row["vectors"],
        "given": given,
        "pieces": pieces[: MAX_TOKENS + given],
        "before": lm_bits,
        "after": bits,
        "margin": margin,
        "marginBefore": lm_margin,
        "horizon": row["horizon"],
        "exact": row["exact"],
        "status": row["status"],
        "accuracy": row["accuracy"],
        "lmBits": row["lm_bits"],
        "memBits": row["mem_bits"],
        "steps": row["steps"],
        "spectrum": spectrum(vectors),
    }


def spectrum(vectors: Any) -> list[float]:
    """Absolute numbers of vectors (K, D), largest first, divided by their root mean square."""
    sizes = np.sort(np.abs(vectors).ravel())[::-1]
    rms = float(np.sqrt((sizes**2).mean())) or 1.0
    at = np.linspace(0, len(sizes) - 1, min(SPECTRUM, len(sizes))).astype(int)
    return [round(float(v) / rms, 3) for v in sizes[at]]


def reproduce(data: Data) -> dict[str, Any]:
    """Spec, commands, models and environments, to repeat the study."""
    stored_spec = data.store.meta("spec")
    spec = json.loads(stored_spec) if stored_spec else {"toml": "", "model": None}
    # A folder of this machine is named by its last part.
    given = spec["model"] or ""
    named = shlex.quote(short(given) if Path(given).is_absolute() else given)
    model = f" --model {named}" if given else ""
    file, folder = (shlex.quote(f"{data.name}.{kind}") for kind in ("toml", "study"))
    models = {
        name: {k: v for k, v in d.items() if k not in ("probe", "name")}
        for name, d in data.models.items()
    }
    return {
        "commands": [
            f"memvec study run {file}{model}",
            f"memvec study check {folder}",
            f"memvec study report {folder}",
        ],
        "spec": spec["toml"],
        "models": models,
        "environments": [
            {k: v for k, v in record.items() if k != "model"} for record in data.environments
        ],
    }


def _number(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


def _clean(value: Any) -> Any:
    """Plain JSON: NaN becomes null, numpy numbers become Python's."""
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return value
