"""How exact capacity changes while a model is trained, and with its width and depth.

Every model of the spec is a checkpoint: a folder whose memvec.json says which run it belongs to
and how much text it has read (`training_of`; recipes/checkpoints.py writes such folders). Cramming
is that of the protocol `exact`.

The bits of a vector are the bits that the model without vectors needs for the tokens of the exact
horizon, as in docs/capacity.md; the information gain of the vectors is in the rows. Runs that
differ only by their seed make one line with an interval over seeds. Where the runs of a family have
several widths D and layer counts L, these bits are fitted as c · D^a · L^b by least squares of the
logarithms, before training and at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from memvec.cramming.outcomes import Outcome
from memvec.errors import MemvecError
from memvec.lab.protocols.exact import Exact
from memvec.lab.protocols.protocol import Card, Compared, extra_of
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import LEVEL, Mean, mean_interval

RECORD_FIELDS = {"run": str, "family": str, "seed": int, "step": int, "tokens": int, "valid": float}


class Checkpoints(Exact):
    """Exact horizons of the checkpoints of training runs."""

    extras = {  # noqa: RUF012
        "run": "name of the training run, text",
        "family": "architecture of the run's model, text",
        "seed": "seed of the training run, number",
        "step": "training steps of the checkpoint",
        "tokens": "tokens of text that it has read",
        "valid": "mean loss of a token of held-out text by the recipe that trained it, nats",
        "width": "D of an input vector, number",
        "layers": "L of the model, number",
    }

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        sizes = {"width": lm.width, "layers": int(lm.config.get_text_config().num_hidden_layers)}
        return {**training_of(lm), **sizes}

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        again = training_of(passage.lm)
        weight = passage.lm.embedding.weight
        again["width"] = int(weight.shape[1])  # type: ignore[union-attr,index]
        again["layers"] = int(passage.lm.config.get_text_config().num_hidden_layers)
        compared = [
            Compared(name, [float(stored[name])], [float(again[name])], [1e-9])
            for name in self.extras
            if name not in ("run", "family")
        ]
        same = [float(stored[name] == again[name]) for name in ("run", "family")]
        return [*compared, Compared("run and family", same, [1.0, 1.0], [0.0, 0.0])]

    def cards(self, data: Data) -> list[Card]:
        return []  # a card for each checkpoint would be too many

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        stages = stages_of(data, self.name)
        lines: list[TableLine] = [
            [
                ("model", shape_name(part.iloc[0])),
                ("tokens read", int(part["tokens"].iloc[0])),
                ("valid loss", float(part["valid"].mean())),
                *interval("text bits / dimension", per_dimension(part)),
                ("exact tokens", mean_interval(part["horizon"].tolist()).mean),
                ("text bits / vector", mean_interval(part["bits"].tolist()).mean),
                ("seeds", len(part)),
                ("passages", int(part["n"].max())),
            ]
            for part in stages
        ]
        return [
            Table.of(
                "checkpoints",
                "Exact capacity over training",
                "Means over training seeds, each the mean of its passages, with the 95 % interval "
                "over seeds. Valid loss is in nats per token. Text bits are those that the model "
                "without vectors needs for the tokens of the exact horizon.",
                lines,
            ),
            _exponents_table(stages),
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        stages = [p for p in stages_of(data, self.name) if p.attrs["stages"] > 2]
        if not stages:
            return []
        panels = []
        for label, measure in (
            ("text bits per dimension", "bits_per_dimension"),
            ("tokens", "horizon"),
        ):
            series = [
                estimates(name, _places(parts), [mean_interval(p[measure].tolist()) for p in parts])
                for name, parts in _lines(stages)
            ]
            panels.append(Panel(f"exact {label}", "tokens read", label, series, log=True))
        losses = [
            Series(name, _places(parts), [float(p["valid"].mean()) for p in parts], "line")
            for name, parts in _lines(stages)
        ]
        panels.append(Panel("valid loss", "tokens read", "nats per token", losses, log=True))
        sentences = [_sentence(name, parts) for name, parts in _lines(stages)]
        if any(_is_untrained(part) for part in stages):
            untrained = "The point at half of the second one's x is the model before training."
            sentences.insert(0, untrained)
        caption = " ".join(["Intervals: 95 %, over training seeds.", *sentences])
        return [Plot("checkpoints", "Capacity over training", caption, panels)]


def training_of(lm: FrozenLM) -> dict[str, Any]:
    """The training record in the model's folder, by the names of RECORD_FIELDS.

    Raises MemvecError for a model without such a record.
    """
    record = lm.facts.get("training")
    if not isinstance(record, dict) or any(
        not isinstance(record.get(name), kind) for name, kind in RECORD_FIELDS.items()
    ):
        raise MemvecError(
            f"{lm.name} has no record of its training, which protocol 'checkpoints' needs: "
            "'training' in its memvec.json must have "
            f"{', '.join(RECORD_FIELDS)} (recipes/checkpoints.py writes it)."
        )
    return {name: record[name] for name in RECORD_FIELDS}


def stages_of(data: Data, protocol: str) -> list[pd.DataFrame]:
    """One table for each shape of model and stage of its training, with a row for each seed.

    Rows of another source, recipe, length or K, or of models that are loaded in another way, make
    stages of their own: their family has these in its name. So do runs of one shape that have the
    same seed, each with its name. Columns: family, width, layers, tokens,
    valid (nats per token), horizon (tokens), bits (of the horizon under the model without vectors),
    bits_per_dimension, n (different passages).
    `attrs["stages"]` is the number of stages of that shape.
    """
    rows = data.restarts(protocol)
    for name in Checkpoints.extras:
        rows = rows.assign(**{f"_{name}": extra_of(rows, protocol, name)})
    rows = rows.assign(_bits=[_bits_alone(data, row) for row in rows.to_dict("records")])
    # The spec's dtype is no condition where it is the same for all.
    dtype = rows["dtype"] if rows["dtype"].nunique() > 1 else ""
    rows = rows.assign(dtype=dtype, quantize=rows["quantize"].fillna(""))
    conditions = ["series", "length", "vectors", "dtype", "quantize"]
    several = len(rows[conditions].drop_duplicates()) > 1
    seeds = []
    shape = ["_family", "_width", "_layers", *conditions]
    # Runs of one seed differ in something that no record has: each is a family of its own.
    runs = rows.groupby([*shape, "_tokens", "_seed"], sort=False)["_run"].transform("nunique")
    apart = runs.gt(1).groupby([rows[name] for name in shape]).transform("any")
    rows = rows.assign(_apart=rows["_run"].where(apart, ""))
    for _, part in rows.groupby([*shape, "_tokens", "_seed", "_apart"], sort=False):
        first, bits = part.iloc[0], float(part["_bits"].mean())
        known = {name: first[f"_{name}"] for name in ("family", "width", "layers", "tokens")}
        if several:
            where = f"{first['series']}, {first['length']} tokens, K {first['vectors']}"
            loaded = [word for word in (first["dtype"], first["quantize"]) if word]
            known["family"] = f"{known['family']} ({', '.join([where, *loaded])})"
        if first["_apart"]:
            known["family"] = f"{known['family']}, {first['_apart']}"
        known |= {"valid": float(first["_valid"]), "horizon": float(part["horizon"].mean())}
        known |= {"bits": bits, "bits_per_dimension": bits / first["_width"] / first["vectors"]}
        seeds.append(known | {"n": int(part["number"].nunique())})
    if not seeds:
        return []
    table = pd.DataFrame(seeds).sort_values("tokens", kind="stable")
    stages = []
    for _, rows_of_shape in table.groupby(["family", "width", "layers"], sort=False):
        count = int(rows_of_shape["tokens"].nunique())
        for _, part in rows_of_shape.groupby("tokens"):
            part.attrs["stages"] = count
            stages.append(part)
    return stages


def _bits_alone(data: Data, row: Mapping[Any, Any]) -> float:
    """Bits that the model without vectors needs for the tokens of a row's horizon."""
    _, positions = data.store.tensors(row["cell"], row["number"])
    return float(positions[0, : int(row["horizon"])].double().sum())


def shape_name(row: pd.Series) -> str:
    """Name of a model shape: family, width D and layer count L."""
    return f"{row['family']}, D {int(row['width'])}, L {int(row['layers'])}"


def per_dimension(part: pd.DataFrame) -> Mean:
    """Text bits per dimension of a stage: mean over seeds with its interval."""
    return mean_interval(part["bits_per_dimension"].tolist())


def _lines(stages: list[pd.DataFrame]) -> Iterator[tuple[str, list[pd.DataFrame]]]:
    """(shape, its stages in the order of training)."""
    names = list(dict.fromkeys(shape_name(part.iloc[0]) for part in stages))
    for name in names:
        yield name, [part for part in stages if shape_name(part.iloc[0]) == name]


def _places(parts: list[pd.DataFrame]) -> list[float]:
    """Tokens read at each stage; 0 is drawn at half of the smallest, for a logarithmic axis."""
    read = [float(part["tokens"].iloc[0]) for part in parts]
    smallest = min((value for value in read if value > 0), default=2.0)
    return [value or smallest / 2 for value in read]


def _sentence(name: str, parts: list[pd.DataFrame]) -> str:
    """A sentence on the ends of a line and its lowest point."""
    means = [per_dimension(part).mean for part in parts]
    lowest = int(np.argmin(means))
    first, read = (int(parts[i]["tokens"].iloc[0]) for i in (0, lowest))
    begin = "before training" if _is_untrained(parts[0]) else f"after {first} tokens"
    return (
        f"{name}: {means[0]:.2f} text bits per dimension {begin}, {means[-1]:.2f} at the "
        f"end; the minimum is {means[lowest]:.2f}, after {read} tokens."
    )


def _is_untrained(part: pd.DataFrame) -> bool:
    """True for the stage of models that have read no token."""
    return bool((part["tokens"] == 0).all())


class Exponents(NamedTuple):
    """bits = c · D^width · L^depth over n models, each exponent with its 95 % interval."""

    width: tuple[float, float, float]
    depth: tuple[float, float, float]
    r_squared: float
    n: int


def exponents(
    width: NDArray[np.float64], depth: NDArray[np.float64], bits: NDArray[np.float64]
) -> Exponents | None:
    """Least squares of log bits on log width and log depth, arrays of equal length.

    Intervals are Student's, with n - 3 degrees of freedom. Models with 0 bits have no logarithm and
    are left out. None if fewer than four models remain, or if width and depth do not vary
    independently.
    """
    positive = bits > 0
    n = int(positive.sum())
    x = np.column_stack([np.ones(n), np.log(width[positive]), np.log(depth[positive])])
    y = np.log(bits[positive])
    if n < 4 or np.linalg.matrix_rank(x) < 3:
        return None
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    residuals = y - x @ coefficients
    error = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * (residuals @ residuals) / (n - 3))
    half = float(stdtrit(n - 3, LEVEL)) * error
    total = ((y - y.mean()) ** 2).sum()
    r_squared = 1 - float(residuals @ residuals) / float(total) if total else math.nan
    ends = [(float(v), float(v - h), float(v + h)) for v, h in zip(coefficients, half, strict=True)]
    return Exponents(ends[1], ends[2], r_squared, n)


def _exponents_table(stages: list[pd.DataFrame]) -> Table:
    """The fits of each family before training and at its end."""
    lines: list[TableLine] = []
    ends: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for _, parts in _lines(stages):
        family = str(parts[0]["family"].iloc[0])
        if _is_untrained(parts[0]):
            ends.setdefault((family, "before training"), []).append(parts[0])
        if not _is_untrained(parts[-1]):
            ends.setdefault((family, "at the end"), []).append(parts[-1])
    for (family, when), parts in ends.items():
        columns = ([float(p[name].mean()) for p in parts] for name in ("width", "layers", "bits"))
        fit = exponents(*(np.array(column) for column in columns))
        if fit is not None:
            lines.append(
                [
                    ("family", family),
                    ("when", when),
                    *interval("a (width)", fit.width),
                    *interval("b (depth)", fit.depth),
                    ("R²", fit.r_squared),
                    ("models", fit.n),
                ]
            )
    return Table.of(
        "exponents",
        "Width and depth: bits of a vector as c · D^a · L^b",
        "Least squares of logarithms over the models of a family (mean over seeds where there are "
        "several), with 95 % intervals.",
        lines,
    )
