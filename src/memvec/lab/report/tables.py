"""Tables: made once as titles and cells, written for a terminal, Markdown, LaTeX or CSV."""

from __future__ import annotations

import bz2
import csv
import io
import json
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memvec import metrics
from memvec.lab.protocols.exact import exact_result
from memvec.lab.protocols.geometry import cosines
from memvec.lab.protocols.one_step import one_step_result
from memvec.lab.protocols.paper import paper_result
from memvec.lab.protocols.threshold import LEAST_ABOVE
from memvec.lab.protocols.vectors import scaling
from memvec.lab.report import published
from memvec.lab.report.data import Data, averaged, short
from memvec.statistics import Mean, mean_interval, share_interval

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """A table with a key (its file name), a title, and what to know when reading it."""

    key: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[Cell]]

    def shown(self) -> list[list[str]]:
        """Cells as text."""
        return [[show(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """GitHub's kind of table."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.shown()]
        return f"### {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        """A booktabs table."""
        head = " & ".join(map(_tex, self.columns)) + r" \\"
        body = "\n".join(" & ".join(map(_tex, row)) + r" \\" for row in self.shown())
        return (
            "\\begin{table}\n\\centering\n"
            f"\\begin{{tabular}}{{{'l' * len(self.columns)}}}\n\\toprule\n"
            f"{head}\n\\midrule\n{body}\n"
            f"\\bottomrule\n\\end{{tabular}}\n\\caption{{{_tex(self.title)}. {_tex(self.note)}}}\n"
            f"\\label{{tab:{self.key}}}\n\\end{{table}}\n"
        )

    def csv(self) -> str:
        """Comma-separated, numbers unrounded."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if c is None else c for c in row] for row in self.rows])
        return out.getvalue()


def show(cell: Cell) -> str:
    """A number with the digits it deserves."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.1f}"
    return str(cell)


def all_tables(data: Data, *, beside: bool) -> list[Table]:
    """Every table the study has rows for. `beside`: the paper's values in extra columns."""
    made = (
        exact_table(data),
        table1(data, beside=beside),
        vectors_table(data),
        one_step_table(data),
        threshold_table(data),
        utilisation_table(data),
        context_table(data, beside=beside),
        copy_table(data),
        upper_bound_table(data),
        geometry_table(data),
        bytes_table(data, beside=beside),
        cost_table(data),
    )
    return [table for table in made if table.rows]


def exact_table(data: Data) -> Table:
    """Exact horizons."""
    rows: list[list[Cell]] = []
    for (model, source, K), group in _groups(data.of("exact")):
        r = exact_result(group)
        share, low, high = r.censored
        rows.append(
            [
                short(model),
                source,
                K,
                r.horizon.mean,
                r.horizon.low,
                r.horizon.high,
                r.horizon.n,
                r.bits.mean,
                r.bits.low,
                r.bits.high,
                f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]",
                r.spent.mean,
            ]
        )
    columns = ["model", "source", "K", "exact tokens", "low", "high", "n", "bits", "low", "high"]
    return Table(
        "exact",
        "Exact horizon: leading tokens that free-running decoding gives back",
        "Mean over passages with its 95 % interval; censored: share of passages that came back "
        "whole and might have been longer; spent: forward-backward tokens a passage.",
        [*columns, "censored", "spent"],
        rows,
    )


def table1(data: Data, *, beside: bool) -> Table:
    """The paper's Table 1."""
    columns = ["model", "source", "K", "Max", "token gain", "± sd", "bits", "± sd", "n"]
    if beside:
        columns += ["paper Max", "paper gain", "paper nats", "paper bits (nats / ln 2)"]
    rows: list[list[Cell]] = []
    for (model, source, K), group in _groups(data.of("paper")):
        r = paper_result(group)
        row: list[Cell] = [
            short(model),
            source,
            K,
            f"{r.longest or '–'}{' (longest single)' if r.drawn and r.longest else ''}",
            r.token_gain.mean,
            r.token_gain.sd,
            r.information_gain.mean,
            r.information_gain.sd,
            r.token_gain.n,
        ]
        if beside:
            known = published.table1(model, str(group["source"].iloc[0])) if K == 1 else None
            row += (
                [None] * 4
                if known is None
                else [
                    known["longest"],
                    _pm(known["token_gain"]),
                    _pm(known["gain_nats"]),
                    _pm(known["gain_bits"]),
                ]
            )
        rows.append(row)
    note = (
        "The published rule: Max is the longest length whose mean teacher-forced accuracy is at "
        "least 0.99; gains average passages with accuracy of at most 0.99, all lengths together. "
        "Nothing here is decoded."
    )
    if beside:
        note += " Published 'bits' are nats: 1 nat = 1 / ln 2 = 1.4427 bits."
    return Table("table1", "Table 1, by the paper's protocol", note, columns, rows)


def vectors_table(data: Data) -> Table:
    """Figure 4 in numbers."""
    rows: list[list[Cell]] = []
    found = data.of("vectors")
    for (model, source), group in found.groupby(["model", "series"], sort=False):
        for line in scaling(group).to_dict("records"):
            rows.append(
                [
                    short(str(model)),
                    str(source),
                    line["K"],
                    line["horizon"],
                    line["horizon_low"],
                    line["horizon_high"],
                    line["bits"],
                    line["bits_per_vector"],
                    f"{100 * line['of_straight_line']:.0f} %",
                    f"{100 * line['censored']:.0f} %",
                    f"{100 * line['cut']:.0f} %",
                    line["n"],
                ]
            )
    columns = ["model", "source", "K", "exact tokens", "low", "high", "bits", "bits / vector"]
    return Table(
        "vectors",
        "K vectors against the straight line",
        "Exact horizon and the information in it; the line is K times one vector's bits. Censored "
        "passages came back whole: their K could have held more.",
        [*columns, "of the line", "censored", "cut", "n"],
        rows,
    )


def one_step_table(data: Data) -> Table:
    """Lengths that one forward pass gives back."""
    rows: list[list[Cell]] = []
    for (model, source, _), group in _groups(data.of("one-step")):
        result = one_step_result(group)
        for at in result.lengths:
            share, low, high = at.exact
            rows.append(
                [
                    short(model),
                    source,
                    at.length,
                    f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]",
                    at.accuracy.mean,
                    at.accuracy.n,
                    result.always,
                    result.longest,
                ]
            )
    columns = ["model", "source", "length", "exact", "accuracy", "n", "always exact", "longest"]
    return Table(
        "one-step",
        "One-step decoding: two vectors, one forward pass",
        "Exact: share of passages given back to the last token, with its 95 % interval. Always "
        "exact: the length up to which all were. Longest: the published figure, the longest single "
        "passage with an accuracy of at least 0.99, a maximum over passages.",
        columns,
        rows,
    )


def threshold_table(data: Data) -> Table:
    """C in bits, by model and kind of text, and the paper's claim put to the test."""
    rows: list[list[Cell]] = []
    for t in data.thresholds:
        drawn, recipe = t.rows["random_text"], f", {t.recipe}" if t.recipe else ""
        parts = (
            ("all", t.all, t.rows),
            ("natural", t.natural, t.rows[~drawn]),
            ("random", t.random, t.rows[drawn]),
        )
        for name, f, part in parts:
            if f is not None:
                cut = float((part["steps"] >= part["step_limit"]).mean())
                said = "" if f.reached else f"not reached: fewer than {LEAST_ABOVE} above"
                rows.append(
                    [
                        short(t.model),
                        t.K,
                        f"{name}{recipe}",
                        f.capacity,
                        f.low,
                        f.high,
                        f.rms,
                        f.n,
                        f.passages,
                        f"{100 * cut:.0f} %",
                        said,
                    ]
                )
        if t.difference is not None:
            d = t.difference
            rows.append(
                [
                    short(t.model),
                    t.K,
                    f"natural − random{recipe}",
                    d.difference,
                    d.low,
                    d.high,
                    None,
                    len(t.rows),
                    None,
                    None,
                    f"p = {d.p:.3f}; {d.verdict}" if d.decided else d.verdict,
                ]
            )
    columns = ["model", "K", "text", "C, bits", "low", "high", "rms, bits", "n", "passages"]
    return Table(
        "threshold",
        "Threshold: bits left with vectors = max(0, H − C)",
        "Least squares; 95 % intervals resample passages; nothing counts as left of a passage with "
        "accuracy of at least 0.99. Rows of the protocols 'threshold' and 'paper'. Passages cut at "
        "their step limit might have gone on: C is then what so many steps reach, and kinds of "
        "text that need more steps look smaller.",
        [*columns, "cut", "says"],
        rows,
    )


def utilisation_table(data: Data) -> Table:
    """Figure 5 in numbers."""
    rows: list[list[Cell]] = []
    for (model, source, protocol, K, _storage), group in data.of("exact", "vectors").groupby(
        ["model", "series", "protocol", "vectors", "storage"], sort=False
    ):
        facts = data.models.get(str(model))
        if facts is None:
            continue
        group = group[group["length"] == group["length"].max()]
        D, V, K = int(facts["width"]), int(facts["vocabulary"]), int(str(K))
        gain, tokens = (
            mean_interval(group[c].tolist()).mean for c in ("horizon_gain", "horizon_token_gain")
        )
        rows.append(
            [
                short(str(model)),
                str(source),
                str(protocol),
                K,
                metrics.theoretical_capacity(D, K, 16, V),
                tokens,
                100 * metrics.token_utilisation(tokens, D, K, 16, V),
                100 * metrics.bit_utilisation(gain, D, K, 16),
                metrics.bits_per_dimension(gain, D, K),
                len(group),
            ]
        )
    columns = ["model", "source", "protocol", "K", "theoretical tokens", "token gain"]
    return Table(
        "utilisation",
        "Theoretical capacity and what is reached of it",
        "16-bit numbers, as in the paper's Figure 5; gains over the exact horizon. The share of "
        "bits is the stricter one: a natural token costs fewer than log2 V bits.",
        [*columns, "% of tokens", "% of bits", "bits / dimension", "n"],
        rows,
    )


def context_table(data: Data, *, beside: bool) -> Table:
    """A vector against real context."""
    rows: list[list[Cell]] = []
    for (model, source, length, k), group in data.of("context").groupby(
        ["model", "series", "length", "vectors"], sort=False
    ):
        K, H = int(str(k)), group["lm_bits"].tolist()
        # Bits left, each with the same passage's bits without anything: not all have the context.
        entries: dict[str, list[tuple[float, float]]] = {"none": list(zip(H, H, strict=True))}
        for extra, base in zip(group["extra"], H, strict=True):
            for n, (b, _) in json.loads(extra)["context"].items():
                entries.setdefault(f"{n} tokens", []).append((b, base))
        name = f"{K} vector{'s' if K > 1 else ''}"
        entries[name] = list(zip(group["mem_bits"], H, strict=True))
        known = published.published()["context"]["values"].get(str(model)) if beside else None
        for name, pairs in entries.items():
            m = mean_interval([left for left, _ in pairs])
            base = mean_interval([base for _, base in pairs]).mean
            row: list[Cell] = [short(str(model)), str(source), int(str(length)), K, name, m.mean]
            row += [m.low, m.high, 100 * (1 - m.mean / base), m.n]
            if beside:
                key = "0" if name == "none" else "vector" if "vector" in name else name.split()[0]
                same = known is not None and known["length"] == length and key in known["nats"]
                same = same and (key != "vector" or K == 1)
                row.append(published.bits(known["nats"][key]) if same and known else None)
            rows.append(row)
    columns = ["model", "source", "length", "K", "given", "bits left", "low", "high", "% removed"]
    return Table(
        "context",
        "A vector against real preceding tokens",
        "Bits of the passage that are left, mean with 95 % interval; removed: of the bits of the "
        "same passages with nothing given (not every passage has so many tokens before it).",
        [*columns, "n", *(["paper, bits"] if beside else [])],
        rows,
    )


def copy_table(data: Data) -> Table:
    """A vector against the text itself in context."""
    rows: list[list[Cell]] = []
    for (model, source, length, K), group in data.of("copy").groupby(
        ["model", "series", "length", "vectors"], sort=False
    ):
        copies = [json.loads(e)["copy"] for e in group["extra"]]
        kept = [c is not None for c in copies]
        group, copies = group[kept], [c for c in copies if c is not None]
        if not copies:
            continue
        H = group["lm_bits"].to_numpy()
        removed = mean_interval((H - group["mem_bits"].to_numpy()).tolist())
        copied = mean_interval((H - np.array([c[0] for c in copies])).tolist())
        right = mean_interval([c[1] / n for c, n in zip(copies, group["predicted"], strict=True)])
        rows.append(
            [
                short(str(model)),
                str(source),
                int(str(length)),
                int(str(K)),
                float(H.mean()),
                removed.mean,
                copied.mean,
                float(group["accuracy"].mean()),
                right.mean,
                len(copies),
            ]
        )
    columns = ["model", "source", "length", "K", "H, bits", "removed by vectors"]
    return Table(
        "copy",
        "A vector against the text repeated in context",
        "Means over passages; the copy is read right before it is asked for.",
        [*columns, "removed by copy", "accuracy, vectors", "accuracy, copy", "n"],
        rows,
    )


def upper_bound_table(data: Data) -> Table:
    """Bits needed against bits removed."""
    rows: list[list[Cell]] = []
    for (model, source, length, K), group in data.of("upper-bound").groupby(
        ["model", "series", "length", "vectors"], sort=False
    ):
        needed = np.array([json.loads(e)["needed_bits"] for e in group["extra"]])
        H, gain = group["lm_bits"].to_numpy(), group["information_gain"].to_numpy()
        rows.append(
            [
                short(str(model)),
                str(source),
                int(str(length)),
                int(str(K)),
                float(H.mean()),
                float(needed.mean()),
                float(gain.mean()),
                100 * float(needed.sum() / gain.sum()),
                len(group),
            ]
        )
    columns = ["model", "source", "length", "K", "H, bits", "needed", "removed"]
    return Table(
        "upper-bound",
        "Bits needed for the arg-max against bits removed",
        "Needed: raising each true token's logit just to the best other one. The paper finds "
        "about half.",
        [*columns, "needed / removed, %", "n"],
        rows,
    )


def geometry_table(data: Data) -> Table:
    """Cosines within and between passages, and the dip on the straight line."""
    rows: list[list[Cell]] = []
    for (model, source, length, K), group in data.restarts().groupby(
        ["model", "series", "length", "vectors"], sort=False
    ):
        vectors, labels = solutions(data, group)
        within, between = cosines(vectors, labels)
        lines = list(paths(data, group))
        dip = mean_interval([min(a) for a in lines])
        a, b = mean_interval(within.tolist()), mean_interval(between.tolist())
        rows.append(
            [
                short(str(model)),
                str(source),
                int(str(length)),
                int(str(K)),
                a.mean,
                a.sd,
                b.mean,
                b.sd,
                dip.mean,
                len(lines),
                len(vectors),
            ]
        )
    columns = ["model", "source", "length", "K", "cosine within", "sd", "cosine between", "sd"]
    return Table(
        "geometry",
        "Restarts: how far apart the solutions of one passage lie",
        "Lowest accuracy: on the straight line between two solutions of a passage, mean over "
        "pairs.",
        [*columns, "lowest accuracy", "lines", "solutions"],
        rows,
    )


def bytes_table(data: Data, *, beside: bool) -> Table:
    """Table 4: honest bytes."""
    rows: list[list[Cell]] = []
    # By protocol and K: a passage of one is the beginning of the same passage of another, which
    # joined would be half as long for zlib as it is.
    for (model, source, protocol, k), group in averaged(data.rows).groupby(
        ["model", "series", "protocol", "vectors"], sort=False
    ):
        longest = group[group["length"] == group["length"].max()].drop_duplicates("passage")
        longest = longest.head(200)
        exact = longest[longest["exact"] == 1]
        texts = [_text(data, key) for key in exact["passage"]]
        if any(_text(data, key) is None for key in longest["passage"]):
            continue
        whole = b"\n".join(t for t in texts if t is not None)
        size = sum(len(t) for t in texts if t is not None)
        K, storage = int(str(k)), str(longest["storage"].iloc[0])
        D = int(data.models[str(model)]["width"])
        stored = {
            "zlib": len(zlib.compress(whole, 9)),
            "bz2": len(bz2.compress(whole, 9)),
            "lzma": len(lzma.compress(whole, preset=9)),
            "huffman": _huffman_bits(whole) / 8,
            "arithmetic": float(exact["lm_bits"].sum()) / 8,
            "vectors": len(exact) * K * D * (4 if storage == "float32" else 2),
        }
        share, low, high = share_interval(len(exact), len(longest))
        row: list[Cell] = [short(str(model)), str(source), str(protocol), K, len(longest)]
        row += [f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]", size]
        rows.append([*row, *(size / b if size else None for b in stored.values())])
    columns = ["model", "source", "protocol", "K", "passages", "exact", "text bytes", "zlib", "bz2"]
    note = (
        "Ratios: bytes of text over bytes stored; the passages of the longest length that came "
        "back exactly, joined (of restarts: if all did). "
        "Arithmetic: an arithmetic coder driven by the same model (H_LM / 8). A ratio below 1 "
        "means the vectors are larger than the text."
    )
    if beside:
        values = published.published()["compression"]["values"]
        note += " Paper, PG-19: " + ", ".join(f"{k} {v['pg19']}" for k, v in values.items()) + "."
    return Table(
        "bytes",
        "Byte accounting",
        note,
        [*columns, "lzma", "huffman", "arithmetic", "vectors"],
        rows,
    )


def cost_table(data: Data) -> Table:
    """What was spent."""
    rows: list[list[Cell]] = []
    for (model, protocol), g in data.rows.groupby(["model", "protocol"], sort=False):
        rows.append(
            [
                short(str(model)),
                str(protocol),
                g["cell"].nunique(),
                len(g),
                int(g["steps"].sum()),
                int(g["spent"].sum()),
                float(g["seconds"].sum()),
            ]
        )
    return Table(
        "cost",
        "What was spent",
        "Steps, forward-backward tokens and seconds, summed over passages.",
        ["model", "protocol", "cells", "passages", "steps", "tokens", "seconds"],
        rows,
    )


def solutions(data: Data, group: pd.DataFrame, most: int = 400) -> tuple[Any, Any]:
    """(vectors (N, K·D), passage numbers (N)) of geometry rows."""
    group = group.head(most)
    vectors = [
        data.store.tensors(cell, number)[0].float().flatten().double().numpy()
        for cell, number in zip(group["cell"], group["number"], strict=True)
    ]
    return np.stack(vectors), group["number"].to_numpy()


def paths(data: Data, group: pd.DataFrame) -> Iterator[list[float]]:
    """Accuracies along straight lines between restarts of a group's cells."""
    cells = set(group["cell"])
    for first, second, text in data.store.db.execute("SELECT first, second, accuracy FROM paths"):
        if first in cells and second in cells:
            yield json.loads(text)


def interval(m: Mean) -> str:
    """Mean [low, high] (n)."""
    return f"{m.mean:.1f} [{m.low:.1f}, {m.high:.1f}] (n {m.n})"


def _groups(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, int], pd.DataFrame]]:
    for (model, source, K), group in rows.groupby(["model", "series", "vectors"], sort=False):
        yield (str(model), str(source), int(str(K))), group


def _text(data: Data, key: str) -> bytes | None:
    found = data.store.db.execute("SELECT text FROM passages WHERE passage=?", (key,)).fetchone()
    return None if found is None or found[0] is None else bytes(found[0])


def _huffman_bits(data: bytes) -> int:
    """Bits of a static Huffman code over bytes, without its table (as in the paper's Table 4)."""
    import heapq

    heap = list(Counter(data).values())
    heapq.heapify(heap)
    total = len(data) if len(heap) == 1 else 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return max(total, 1)


def _pm(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1f} ± {pair[1]:.1f}"


def _tex(text: str) -> str:
    for a, b in (("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("±", r"$\pm$"), ("≤", r"$\le$")):
        text = text.replace(a, b)
    return text.replace("−", "$-$").replace("·", r"$\cdot$").replace("#", r"\#")
