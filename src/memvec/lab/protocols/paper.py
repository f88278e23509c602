"""The paper's protocol: a grid of lengths, mean teacher-forced accuracy of at least 0.99.

Kuratov et al. 2025, section 3 and `ablations_analyze_results.ipynb`, kept as published, with
its peculiarities:
- nothing is decoded: a length counts when the *mean* accuracy with true earlier tokens is >= 0.99;
- shorter lengths need not pass, and the grid limits the answer;
- the first token (or BOS) is given, and counts in the length: T tokens have T - 1 predictions;
- gains are averaged over passages with accuracy <= 0.99, all lengths together;
- with drawn lengths (random text) the answer is the longest single passage, not a mean;
- the information gain is taken at the least loss of all steps, the accuracy at the best step.
  The report has both gains: at the least loss, and of the stored vectors, whose accuracy is best.
Bits are bits, summed over the T - 1 predicted tokens; published figures are mean nats times T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from memvec.lab.protocols.protocol import Capacity, Gains, Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_series
from memvec.lab.report.plot import Panel, Plot, Series, boxes, estimates, n_of
from memvec.lab.report.table import Table, TableLine, mean_and_sd, with_sd
from memvec.model.reading import StartRule
from memvec.statistics import Mean, mean_interval

THRESHOLD = 0.99
MAX_BOXES = 24  # lengths in a panel


class Paper(Protocol):
    """Capacity and gains by the published rule."""

    plane = "threshold"

    def tokens(self, length: int, K: int, start_rule: StartRule) -> int:
        """`length`, less one where BOS counts as the first of the paper's tokens."""
        return max(length - (start_rule == "bos"), 1)

    def capacity(self, rows: pd.DataFrame) -> Capacity | None:
        longest = paper_result(rows).longest
        return None if longest is None else Capacity(float(longest))

    def gains(self, rows: pd.DataFrame) -> Gains | None:
        """Gains of the passages that filled their vectors, as in the paper's Table 1."""
        full = unsaturated(rows)
        if full.empty:
            return None
        rule = f"passages with accuracy ≤ {THRESHOLD}"
        bits, tokens = (full[name].tolist() for name in ("information_gain", "token_gain"))
        return Gains(bits, tokens, rule, full["number"].tolist())

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, source, K), group in by_series(data.of(self.name)):
            r = paper_result(group)
            longest = f"{r.longest or '–'}{' (longest single)' if r.drawn and r.longest else ''}"
            line: TableLine = [
                ("model", model),
                ("source", source),
                ("K", K),
                ("Max", longest),
                *with_sd("token gain", r.token_gain, "± sd"),
                *with_sd("bits", r.information_gain, "± sd"),
                ("n", r.token_gain.n),
                *with_sd("bits at the least loss", r.least_loss_gain, "± sd"),
            ]
            if compare:
                line += _published(data.published_as(model), str(group["source"].iloc[0]), K)
            lines.append(line)
        note = (
            "The published rule: Max is the longest length (tokens) whose mean teacher-forced "
            "accuracy is at least 0.99; gains are means and standard deviations over n rows "
            "with accuracy of at most 0.99, all lengths together, so that a text may count several "
            "times. Passages are not decoded. Bits are those of the stored vectors, which have the "
            "best accuracy; the published gain is taken at the least loss of all steps."
        )
        if compare:
            note += " Published 'bits' are nats: 1 nat = 1 / ln 2 = 1.4427 bits."
        return [Table.of("table1", "Table 1, by the paper's protocol", note, lines)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        rows = data.of(self.name)
        return [accuracy(data, rows, compare), spread(rows)]


def accuracy(data: Data, rows: pd.DataFrame, compare: bool) -> Plot:
    """Teacher-forced accuracy over length; drawn lengths get a rolling mean of 11."""
    panels = []
    for model, group in rows.groupby("model", sort=False):
        series: list[Series] = []
        for (source, K), part in group.groupby(["series", "vectors"], sort=False):
            name = f"{source}" + (f", K = {K}" if group["vectors"].nunique() > 1 else "")
            drawn = part.groupby("length")["tokens"].nunique().max() > 1
            series += _rolling(name, part) if drawn else [_by_length(name, part)]
        name = data.published_as(str(model))
        paper_values = published.published()["curves"]["values"].get(name)
        if compare and paper_values:
            curve = {float(k): float(v) for k, v in paper_values["accuracy"].items()}
            series.append(Series("PG-19, published", list(curve), list(curve.values()), "line"))
        xs = [v for s in series for v in s.x]
        series.append(Series("0.99", [min(xs), max(xs)], [THRESHOLD] * 2, "dashed"))
        panels.append(Panel(str(model), "tokens", "teacher-forced accuracy", series, log=True))
    n = n_of(rows.groupby(["model", "series", "vectors", "length"]).size())
    caption = f"Mean over passages, 95 % interval; {n} for each length. {_passed(rows)}"
    return Plot("accuracy", "Accuracy against length", caption.strip(), panels)


def _passed(rows: pd.DataFrame) -> str:
    """How many lines reach the threshold, and how many of them fail at a shorter length."""
    cases = passed = again = 0
    for _, part in rows.groupby(["model", "series", "vectors"], sort=False):
        if part.groupby("length")["tokens"].nunique().max() == 1:
            over = (part.groupby("length")["accuracy"].mean() >= THRESHOLD).tolist()
            cases, passed = cases + 1, passed + any(over)
            again += over != sorted(over, reverse=True)
    if not cases:
        return ""
    return (
        f"{passed} of {cases} lines reach {THRESHOLD} at some length; {again} of them fail at a "
        "shorter length than one that passes."
    )


def _rolling(name: str, rows: pd.DataFrame) -> list[Series]:
    ordered = rows.sort_values("tokens")
    rolling = ordered["accuracy"].rolling(11, center=True, min_periods=1)
    mean, sd = rolling.mean(), rolling.std().fillna(0.0)
    x = ordered["tokens"].astype(float).tolist()
    edges = ((f"{name}, ± sd", mean - sd), ("", (mean + sd).clip(upper=1)))
    return [
        Series(f"{name}, rolling 11", x, mean.tolist(), "line"),
        *(Series(label, x, edge.tolist(), "dashed") for label, edge in edges),
    ]


def _by_length(name: str, rows: pd.DataFrame) -> Series:
    means = {
        float(str(length)): mean_interval(cell["accuracy"].tolist())
        for length, cell in rows.groupby("length")
    }
    # The interval of a share by Student's t may leave the range of shares; NaN is kept.
    capped = [replace(m, low=max(m.low, 0.0), high=min(m.high, 1.0)) for m in means.values()]
    hover = [f"{length:.0f} tokens: {m.mean:.4f} (n {m.n})" for length, m in means.items()]
    return estimates(name, means, capped, hover=hover)


def spread(rows: pd.DataFrame) -> Plot:
    """Spread over passages of the token gain and of the text's bits without vectors, by length."""
    panels: list[Panel] = []
    counts: list[int] = []
    what = (("token_gain", "token gain"), ("lm_bits", "bits without vectors, H"))
    for (model, source), group in rows.groupby(["model", "series"], sort=False):
        group = group[group["vectors"] == group["vectors"].min()]
        if group.groupby("length")["tokens"].nunique().max() > 1:
            continue  # every passage has a length of its own
        lengths = sorted(group["length"].unique())[-MAX_BOXES:]
        for column, label in what:
            parts = [group.loc[group["length"] == n, column].astype(float) for n in lengths]
            title, names = f"{model}, {source}", [str(n) for n in lengths]
            panels.append(Panel(title, "tokens", label, [boxes(label, parts)], names))
            counts += [len(part) for part in parts]
    caption = (
        "Boxes: median and quartiles over passages; whiskers: minimum and maximum; "
        f"{n_of(counts)} for each box."
    )
    return Plot("boxes", "Spread over passages, by length", caption, panels)


def _published(model: str, source: str, K: int) -> TableLine:
    """Table 1's four values; for K > 1 those of Figure 4."""
    known = published.table1(model, source, K) or {}
    return [
        ("paper Max", known.get("longest")),
        ("paper gain", mean_and_sd(known.get("token_gain"))),
        ("paper nats", mean_and_sd(known.get("gain_nats"))),
        ("paper bits (nats / ln 2)", mean_and_sd(known.get("gain_bits"))),
    ]


@dataclass(frozen=True)
class PaperResult:
    """Table 1 for one model, source and K."""

    longest: int | None  # "Max"; None: no length passed
    drawn: bool  # longest single passage rather than a mean
    token_gain: Mean
    information_gain: Mean  # bits, of the stored vectors
    least_loss_gain: Mean | None  # bits, at the least loss; None where steps did not measure it


def decoding_capacity(rows: pd.DataFrame) -> int | None:
    """Longest length of the grid whose mean accuracy reaches the threshold."""
    accuracy = rows.groupby("length")["accuracy"].mean()
    passed = accuracy[accuracy >= THRESHOLD]
    return int(passed.index.max()) if len(passed) else None


def paper_result(rows: pd.DataFrame) -> PaperResult:
    """Summary of the rows of one model, source and K, all lengths together."""
    # Passages of one length have equal token counts unless each drew a length.
    drawn = bool((rows.groupby("length")["tokens"].nunique() > 1).any())
    if drawn:
        passed = rows[rows["accuracy"] >= THRESHOLD]
        # A BOS counts as one of the paper's tokens (`Paper.tokens`).
        lengths = passed["tokens"] + (passed["start_rule"] == "bos")
        longest = int(lengths.max()) if len(passed) else None
    else:
        longest = decoding_capacity(rows)
    full = unsaturated(rows)
    at_least_loss = full["least_loss_gain"].dropna() if "least_loss_gain" in full else None
    return PaperResult(
        longest,
        drawn,
        mean_interval(full["token_gain"].tolist()),
        mean_interval(full["information_gain"].tolist()),
        mean_interval(at_least_loss.tolist())
        if at_least_loss is not None and len(at_least_loss)
        else None,
    )


def unsaturated(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose passages did not fit their vectors; the paper averages gains over these."""
    return rows[rows["accuracy"] <= THRESHOLD]
