"""How bits and gains spread over lengths, and what of a model goes with its capacity.

The paper's entropy notebooks (`text_ppl_vs_compression*.ipynb`): loss against length, box plots of
token gain and of the text's own bits per length, and the search for a predictor of capacity.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from memvec.lab.report import published
from memvec.lab.report.data import Data, short
from memvec.lab.report.plots import Panel, Plot, Series
from memvec.statistics import mean_interval

MOST_BOXES = 24  # lengths in a panel


def per_token(data: Data, *, beside: bool) -> Plot:
    """Bits per token against length, without vectors and with."""
    panels = []
    for model, group in data.of("paper", "threshold").groupby("model", sort=False):
        group = group[group["vectors"] == group["vectors"].min()]
        series = []
        for source, part in group.groupby("series", sort=False):
            for name, column in (("without", "lm_bits"), ("with", "mem_bits")):
                means = [
                    (float(str(length)), mean_interval((cell[column] / cell["predicted"]).tolist()))
                    for length, cell in part.groupby("length")
                ]
                series.append(
                    Series(
                        f"{source}, {name}",
                        [x for x, _ in means],
                        [m.mean for _, m in means],
                        "line",
                        [m.low for _, m in means],
                        [m.high for _, m in means],
                    )
                )
        known = published.published()["curves"]["values"].get(str(model)) if beside else None
        keys = (("without", "nats_per_token"), ("with", "nats_per_token_with_vector"))
        for name, key in keys:
            curve = (
                {float(k): published.bits(float(v)) for k, v in known[key].items()} if known else {}
            )
            if not curve:
                continue
            label = f"PG-19, {name}, published"
            series.append(Series(label, list(curve), list(curve.values()), "dashed"))
        panels.append(Panel(short(str(model)), "tokens", "bits per token", series, log=True))
    return Plot(
        "per-token",
        "Bits per token against length",
        "Without vectors a text gets easier as it goes on; with them it is free until they are "
        "full. Mean over passages, 95 % interval.",
        panels,
    )


def boxes(data: Data) -> Plot:
    """Spread over passages of the token gain and of the text's own bits, by length."""
    panels = []
    what = (("token_gain", "token gain"), ("lm_bits", "bits without vectors, H"))
    for (model, source), group in data.of("paper").groupby(["model", "series"], sort=False):
        group = group[group["vectors"] == group["vectors"].min()]
        if group.groupby("length")["tokens"].nunique().max() > 1:
            continue  # every passage has a length of its own
        lengths = sorted(group["length"].unique())[-MOST_BOXES:]
        for column, label in what:
            parts = [group.loc[group["length"] == n, column].astype(float) for n in lengths]
            title = f"{short(str(model))}, {source}"
            names = [str(n) for n in lengths]
            panels.append(Panel(title, "tokens", label, [_boxes(label, parts)], names))
    return Plot(
        "boxes",
        "Spread over passages, by length",
        "Median, quartiles and extremes.",
        panels,
    )


def predictors(data: Data) -> Plot:
    """C against the width of the vectors, and against the bits of a token; one point a model."""
    points = []
    for t in data.thresholds:
        facts = data.models.get(t.model)
        if t.K == 1 and t.all is not None and t.all.reached and facts is not None:
            per = float((t.rows["lm_bits"] / t.rows["predicted"]).mean())
            name = short(t.model) + (f", {t.recipe}" if t.recipe else "")
            points.append((name, (float(facts["width"]), per), t.all))
    panels = []
    for i, label in enumerate(("width D", "bits per token without vectors")):
        if len(points) > 1:
            series = [
                Series(name, [at[i]], [fit.capacity], low=[fit.low], high=[fit.high])
                for name, at, fit in points
            ]
            panels.append(Panel("", label, "C, bits", series))
    return Plot(
        "predictors",
        "What goes with capacity",
        "C of one vector, with its 95 % interval, for each model that was filled.",
        panels,
    )


def _boxes(name: str, parts: list[pd.Series]) -> Series:
    """One box for each part, side by side."""
    five = [np.percentile(part, [0, 25, 50, 75, 100]).tolist() for part in parts]
    return Series(
        name,
        [float(i) for i in range(len(parts))],
        [f[2] for f in five],
        "boxes",
        [f[1] for f in five],
        [f[3] for f in five],
        [f"n {len(part)}, {f[0]:.4g} to {f[4]:.4g}" for part, f in zip(parts, five, strict=True)],
        [f[0] for f in five],
        [f[4] for f in five],
    )
