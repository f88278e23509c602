"""Draw plots with matplotlib: PDF, SVG and PNG, each with its data as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memvec.lab.report.plot import Panel, Plot, Series
from memvec.writing import make_folder

COLOURS = (
    *("#3264c8", "#d9622b", "#2a9d6f", "#8e44ad", "#c0a000", "#c03a56", "#4a9fb5", "#7a7a7a"),
    *("#6b4226", "#e38fb4", "#1b4d3e", "#a8c256"),
)
COLUMNS = 3  # panels in a row
# With more named series in a panel, or longer names, one legend stands below all panels.
MANY, LONG = 4, 28


def draw_all(plots: list[Plot], folder: Path) -> None:
    """Write every plot into a folder.

    A caller's backend and settings of matplotlib stay as they are. A dollar sign in a name is text.
    """
    import matplotlib as mpl

    # Text as text is smaller and searchable in an SVG.
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        make_folder(folder)
        for plot in plots:
            plot_data(plot).to_csv(folder / f"{plot.key}.csv", index=False)
            figure = draw(plot)
            for kind in ("pdf", "svg", "png"):
                # No date in the file: the same study draws the same bytes.
                metadata = {"Date": None} if kind == "svg" else None
                metadata = {"CreationDate": None} if kind == "pdf" else metadata
                figure.savefig(folder / f"{plot.key}.{kind}", dpi=120, metadata=metadata)


def plot_data(plot: Plot) -> pd.DataFrame:
    """Every point of a plot, one line each."""
    lines = []
    for panel in plot.panels:
        for s in panel.series:
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
                lines.append(
                    {
                        "panel": panel.title,
                        "series": s.name,
                        "x": panel.names[int(x)] if panel.names else x,
                        "y": y,
                        "low": s.low[i] if s.low else np.nan,
                        "high": s.high[i] if s.high else np.nan,
                        "minimum": s.minimum[i] if s.minimum else np.nan,
                        "maximum": s.maximum[i] if s.maximum else np.nan,
                    }
                )
    return pd.DataFrame(lines)


def draw(plot: Plot) -> Any:
    """A matplotlib figure, apart from those of pyplot."""
    from matplotlib.figure import Figure

    n = len(plot.panels)
    columns = min(n, COLUMNS)
    lines = -(-n // columns)
    names = _names_below(plot)
    across = max(1, int(4.6 * columns / (0.07 * max(map(len, names), default=0) + 0.5)))
    below = 0.2 * -(-len(names) // across)  # inches
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines + below), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax, panel in zip(axes.flat, plot.panels, strict=False):
        _panel(ax, panel, names)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    if names:
        drawn = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes.flat]
        handles = {label: handle for pairs in drawn for handle, label in pairs}
        place = {"loc": "outside lower center", "ncols": across}
        figure.legend(handles.values(), handles, fontsize=7, edgecolor="none", **place)
    figure.suptitle(plot.title, fontsize=11)
    return figure


def _names_below(plot: Plot) -> list[str]:
    """The names in the legend below all panels; none where each panel has room for its own."""
    panels = [[s.name for s in p.series if s.name and s.mark != "boxes"] for p in plot.panels]
    if all(len(own) <= MANY and max(map(len, own), default=0) <= LONG for own in panels):
        return []
    return list(dict.fromkeys(name for own in panels for name in own))


def _panel(ax: Any, panel: Panel, below: list[str]) -> None:
    """Draw a panel. A name in the legend `below` has one colour in all panels."""
    bars = [s for s in panel.series if s.mark == "bars"]
    named = [i for i, s in enumerate(panel.series) if s.name]
    for i, s in enumerate(panel.series):
        # A series without a name goes with the one before it.
        shown = max([k for k in named if k <= i], default=i)
        name = panel.series[shown].name
        colour = COLOURS[(below.index(name) if name in below else shown) % len(COLOURS)]
        if s.mark == "bars":
            width = 0.8 / len(bars)
            shift = (bars.index(s) - (len(bars) - 1) / 2) * width
            ax.bar(np.array(s.x) + shift, s.y, width, label=s.name or None, color=colour)
            _intervals(ax, s, "black", shift)
        elif s.mark == "boxes":
            _boxes(ax, s, colour)
        else:  # side by side rather than on top of each other where x is a name
            shift = (i - (len(panel.series) - 1) / 2) * 0.08 if panel.names else 0.0
            _curve(ax, s, colour, shift)
    if panel.names:
        ax.set_xticks(range(len(panel.names)), panel.names, fontsize=8, rotation=15, ha="right")
        ax.set_xlim(-0.6, len(panel.names) - 0.4)
    if panel.log:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    if panel.log_y:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    ax.title.set_fontsize(9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if not below and any(s.name and s.mark != "boxes" for s in panel.series):
        # The legend is transparent, so that the curves under it stay visible. Its edge keeps its
        # marks apart from the data's.
        ax.legend(fontsize=7, framealpha=0.6, edgecolor="0.8", loc="best")
    heights = [v for s in panel.series for v in s.y if np.isfinite(v)]
    if panel.names and heights and min(heights) >= 0 and panel.series[0].mark != "boxes":
        ax.set_ylim(0, ax.get_ylim()[1] * (1.3 if bars and not below else 1.0))
    elif heights and not panel.log_y and min(heights) == max(heights) > 0:
        # By itself, the axis of a constant share has ticks above 1.
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    whole = all(float(v).is_integer() for s in panel.series for v in s.x)
    if whole and not panel.names and not panel.log:
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no half of a token


def _boxes(ax: Any, s: Series, colour: str) -> None:
    keys = ("med", "q1", "q3", "whislo", "whishi")
    edges = [edge or [] for edge in (s.low, s.high, s.minimum, s.maximum)]
    five = zip(s.y, *edges, strict=True)
    lines = ("boxprops", "medianprops", "whiskerprops", "capprops")
    ax.bxp(
        [dict(zip(keys, one, strict=True)) for one in five],
        positions=s.x,
        showfliers=False,
        widths=0.5,
        **{line: {"color": colour} for line in lines},
    )


def _curve(ax: Any, s: Series, colour: str, shift: float) -> None:
    """Points or a line, with intervals where there are some."""
    x, y, label = np.array(s.x, float) + shift, np.array(s.y, float), s.name or None
    if s.mark == "points":
        size = 10 if len(x) > 50 else 22
        ax.scatter(x, y, s=size, label=label, color=colour, alpha=0.7, linewidths=0)
    else:
        style = "--" if s.mark == "dashed" else "-"
        marker = "o" if s.mark == "line" and len(x) < 20 else ""
        ax.plot(x, y, style, marker=marker, ms=4, lw=1.3, label=label, color=colour)
    _intervals(ax, s, colour, shift)


def _intervals(ax: Any, s: Series, colour: str, shift: float) -> None:
    if s.low and s.high:
        x, y = np.array(s.x, float) + shift, np.array(s.y, float)
        low, high = np.array(s.low, float), np.array(s.high, float)
        error = np.nan_to_num(np.abs(np.stack([y - low, high - y])))
        ax.errorbar(x, y, error, fmt="none", ecolor=colour, lw=1, capsize=2)
