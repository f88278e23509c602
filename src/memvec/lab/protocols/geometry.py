"""Many solutions of one passage: the distances and the accuracy between them.

Paper, appendix E: restarts of one text reach different vectors. The protocol compares cosines
between solutions of one text with those between texts, and measures the accuracy on the straight
line between two solutions of one text. Restarts are the seeds of the run, so they start from noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.cramming.outcomes import position_scores
from memvec.lab import slow
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report.data import Data, by_length, place
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableLine, with_sd
from memvec.lab.study.spec import RunSpec
from memvec.metrics import teacher_forced_accuracy
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage
from memvec.statistics import mean_interval
from memvec.writing import read_json

POINTS = 11  # on the straight line, both ends included
MAX_SOLUTIONS = 400  # of a group, for cosines and components
MAX_COLOURS = 10  # passages shown in a plane of components


class Geometry(Protocol):
    """Distances and straight lines between restarts of one passage."""

    changes = {"start": "noise"}  # noqa: RUF012
    compares_restarts = True

    def problem(self, run: RunSpec) -> str | None:
        if run.recipe.get("start", "noise") == "encoder":
            return "compares restarts, which must differ, so start cannot be 'encoder'"
        if run.recipe.get("space", "inputs") != "inputs":
            return "draws lines between inputs, so space is 'inputs'"
        return None

    @torch.no_grad()
    def between(
        self, lm: FrozenLM, passage: Passage, a: Tensor, b: Tensor, start_rule: StartRule
    ) -> list[float]:
        """Teacher-forced accuracy at evenly spaced points from solution a to b, (K, D) each."""
        t = torch.linspace(0, 1, POINTS)[:, None, None]
        line = (1 - t) * a.float() + t * b.float()
        margin = position_scores(lm, line, [passage] * POINTS, start_rule).margin
        return [teacher_forced_accuracy(row > 0) for row in margin]

    def recompute_between(
        self, lm: FrozenLM, ids: tuple[int, ...], a: Tensor, b: Tensor, start_rule: str
    ) -> tuple[list[float], list[float]]:
        accuracy, allowed = [], []
        for i in range(POINTS):
            t = i / (POINTS - 1)
            vectors = (1 - t) * a.float() + t * b.float()
            _, margin = slow.teacher_forced(lm, vectors, ids, start_rule)
            accuracy.append(float((margin > 0).mean()))
            allowed.append(int((np.abs(margin) < slow.TIE).sum()) / len(margin) + 1e-6)
        return accuracy, allowed

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        table_lines: list[TableLine] = []
        for key, group in by_length(data.restarts(self.name)):
            vectors, labels = solutions(data, group)
            within, between = (mean_interval(c.tolist()) for c in cosines(vectors, labels))
            lines = list(paths(data, group))
            lowest = mean_interval([min(a) for a in lines])
            table_lines.append(
                [
                    *place(*key),
                    *with_sd("cosine within", within),
                    *with_sd("cosine between", between),
                    ("lowest accuracy", lowest.mean),
                    ("lines", len(lines)),
                    ("solutions", len(vectors)),
                ]
            )
        return [
            Table.of(
                "geometry",
                "Restarts: how far apart the solutions of one passage lie",
                "Cosines: mean and standard deviation over pairs of solutions, of one passage "
                "(within) and of different passages (between). Lowest accuracy: minimum of the "
                "teacher-forced accuracy on the straight line between two solutions of a passage, "
                "mean over lines.",
                table_lines,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels, within, between, lowest = [], [], [], []
        for (model, source, length, K), group in by_length(data.restarts(self.name)):
            vectors, labels = solutions(data, group)
            if len(vectors) < 3:
                continue
            same, different = cosines(vectors, labels)
            title = f"{model}, {source}, {length} tokens, K = {K}"
            panels.append(Panel(title, "cosine", "density", _densities(same, different)))
            panels += _components(vectors, labels)
            lines = np.array(list(paths(data, group)))
            if len(lines):
                panels.append(_walks(lines))
                lowest += lines.min(1).tolist()
            within += same.tolist()
            between += different.tolist()
        caption = _caption(within, between, lowest)
        title = "Restarts of one passage (Figures 7 and 8)"
        return [Plot("geometry", title, caption, panels)]


def _caption(within: list[float], between: list[float], lowest: list[float]) -> str:
    """Means, how far the two kinds of cosines overlap, and how many lines fall below 1."""
    caption = (
        f"Mean cosine of two solutions: {_mean(within)} within a passage, {_mean(between)} between "
        "passages."
    )
    if within and between:
        beyond = 100 * float(np.mean(np.array(within) <= max(between)))
        caption += (
            f" {beyond:.0f} % of those within a passage are not above the largest between passages."
        )
    if lowest:
        dips = sum(v < 1 for v in lowest)
        caption += (
            f" On {dips} of {len(lowest)} straight lines between two solutions of a passage the "
            f"accuracy falls below 1; mean of the lowest {_mean(lowest)}."
        )
    return caption


def cosines(
    vectors: NDArray[np.float64], passages: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines of all pairs of solutions (N, K·D): (same passage, different passages)."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    table = unit @ unit.T
    i, j = np.triu_indices(len(vectors), 1)
    same = passages[i] == passages[j]
    values = table[i, j]
    return values[same], values[~same]


def principal_components(
    vectors: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(coordinates (N, n), share of variance of each component (n)) of the first n, at most 3."""
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    total = float((s**2).sum()) or 1.0
    return (u * s)[:, :3], (s**2 / total)[:3]


def solutions(data: Data, group: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(vectors (N, K·D), passage numbers (N)) of rows, at most MAX_SOLUTIONS."""
    group = group.head(MAX_SOLUTIONS)
    vectors = [
        data.store.tensors(cell, number)[0].float().flatten().double().numpy()
        for cell, number in zip(group["cell"], group["number"], strict=True)
    ]
    return np.stack(vectors), group["number"].to_numpy()


def paths(data: Data, group: pd.DataFrame) -> Iterator[list[float]]:
    """Accuracies along straight lines between restarts of a group's cells."""
    cells, numbers = set(group["cell"]), set(group["number"])
    query = "SELECT first, second, number, accuracy FROM paths"
    for first, second, number, text in data.store.db.execute(query):
        if first in cells and second in cells and number in numbers:
            yield read_json(text)


def _densities(within: NDArray[np.float64], between: NDArray[np.float64]) -> list[Series]:
    edges = np.linspace(-0.2, 1.0, 49)
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    series = []
    for name, values in (("same passage", within), ("different passages", between)):
        if len(values):
            density, _ = np.histogram(values, edges, density=True)
            series.append(Series(f"{name} (n {len(values)})", middle, density.tolist(), "line"))
    return series


def _components(vectors: NDArray[np.float64], labels: NDArray[np.int64]) -> list[Panel]:
    where, share = principal_components(vectors)
    numbers = list(dict.fromkeys(labels.tolist()))[:MAX_COLOURS]
    panels = []
    for i, j in itertools.combinations(range(where.shape[1]), 2):
        clouds = [
            Series(
                f"passage {number}",
                where[labels == number, i].tolist(),
                where[labels == number, j].tolist(),
            )
            for number in numbers
        ]
        x, y = (f"component {k + 1} ({100 * share[k]:.0f} %)" for k in (i, j))
        panels.append(Panel(f"PCA, components {i + 1} and {j + 1}", x, y, clouds))
    return panels


def _walks(lines: NDArray[np.float64]) -> Panel:
    """A panel of accuracies (lines, points) between two solutions."""
    t = np.linspace(0, 1, lines.shape[1]).tolist()
    series = [
        Series(f"mean of {len(lines)}", t, lines.mean(0).tolist(), "line"),
        Series("lowest", t, lines.min(0).tolist(), "dashed"),
    ]
    return Panel("between two solutions", "from one to the other", "accuracy", series)


def _mean(values: list[float]) -> str:
    return f"{float(np.mean(values)):.3f} (n {len(values)})" if values else "–"
