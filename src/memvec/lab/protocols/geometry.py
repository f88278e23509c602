"""Many solutions of one passage: how far apart they lie and what stands between them.

Paper, appendix E: restarts of one text reach different vectors; cosines within a text are higher
than between texts but far from 1; on the straight line between two solutions accuracy falls below
1. Restarts are the seeds of the run, so they must begin at noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from memvec.lab.protocols.protocol import Protocol

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.model.reading import StartRule
from memvec.passages.passage import Passage

POINTS = 11  # on the straight line, both ends included


class Geometry(Protocol):
    """Restarts of one passage."""

    name = "geometry"
    changes = {"start": "noise"}  # noqa: RUF012


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
    vectors: NDArray[np.float64], n: int = 3
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(coordinates (N, n), share of variance of each component (n)) by an SVD."""
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    n = min(n, len(s))
    total = float((s**2).sum()) or 1.0
    return u[:, :n] * s[:n], s[:n] ** 2 / total


@torch.no_grad()
def straight_line(
    lm: FrozenLM,
    passage: Passage,
    a: Float[Tensor, "K D"],
    b: Float[Tensor, "K D"],
    start: StartRule,
    points: int = POINTS,
) -> list[float]:
    """Teacher-forced accuracy at evenly spaced points from solution a to solution b."""
    from memvec.cramming.certify import positions
    from memvec.metrics import teacher_forced_accuracy

    t = torch.linspace(0, 1, points)[:, None, None]
    line = (1 - t) * a.float()[None] + t * b.float()[None]
    margin = positions(lm, line, [passage] * points, start).margin
    return [teacher_forced_accuracy(row > 0) for row in margin]
