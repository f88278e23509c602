"""The base class of protocols: how passages are crammed, what is measured, and how it is reported.

A protocol is one file. It has a subclass of `Protocol` under a name, sometimes an extra measurement
with its slow recomputation, and the tables and figures of its rows. The engine does the cramming,
the decoding and the common measurements in the same way for all. Another package can add one:

    from memvec import register
    from memvec.lab.protocols.protocol import Protocol

    @register("protocol", "mine")
    class Mine(Protocol):
        extras = {"hits": "arg-max hits with the vectors, tokens"}

        def extra(self, lm, sourced, outcome, start_rule, options):
            return {"hits": int((outcome.scores.margin > 0).sum())}

Ray workers import only the modules that `memvec.plugins` entry points name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from memvec import metrics
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Plot
from memvec.lab.report.table import Table
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import Layout, Reading, StartRule, reading_named
from memvec.passages.passage import Passage
from memvec.writing import path_of, read_json


class Options(BaseModel):
    """A protocol's own options, written beside `protocol` in a run of a spec; none by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Compared:
    """One extra measurement: stored values, recomputed values, and how far each pair may differ."""

    name: str
    stored: Sequence[float]
    recomputed: Sequence[float]
    allowed: Sequence[float]


class Capacity(NamedTuple):
    """Decoding capacity of one model, source and K, tokens; the interval where there is one."""

    tokens: float
    low: float | None = None
    high: float | None = None
    hover: str = ""


class Gains(NamedTuple):
    """Information gains (bits) and token gains of rows, and the rule that selects these.

    `passages` has the number of each row's passage, where one may have several rows (lengths,
    restarts): intervals are over passages. Without it each row is a passage of its own.
    """

    bits: list[float]
    tokens: list[float]
    rule: str
    passages: list[int] | None = None


class Card(NamedTuple):
    """A number at the top of the report page: a value, and a sentence that explains it."""

    value: str
    label: str


class Protocol:
    """Base class; its defaults suit a protocol that measures nothing besides cramming."""

    preset: ClassVar[str] = "paper"  # the recipe a run starts from
    changes: ClassVar[Mapping[str, Any]] = {}  # the protocol's changes to that recipe
    layout: ClassVar[Layout] = "prefix"  # how the model reads the vectors (memvec.model.reading)
    Options: ClassVar[type[BaseModel]] = Options
    extras: ClassVar[Mapping[str, str]] = {}  # what `extra` adds to a row: a sentence with its unit
    not_recomputed: ClassVar[tuple[str, ...]] = ()  # extras that `recompute` leaves out
    plane: ClassVar[str] = ""  # protocols with the same plane are compared with each other
    measures_horizon: ClassVar[bool] = False  # its result is the exact horizon
    compares_restarts: ClassVar[bool] = False  # `between` is measured of pairs of seeds

    def __init__(self, name: str) -> None:
        self.name = name

    # ------------------------------------------------------------------ before and while cramming

    def problem(self, run: RunSpec) -> str | None:
        """What must change in a run of a spec, as the end of a sentence; None if it is valid."""
        return None

    def missing(self, options: Mapping[str, Any]) -> str | None:
        """A sentence about a file that the options name and that is missing; None if none is."""
        return None

    def files(self, options: Mapping[str, Any]) -> dict[str, Path]:
        """The files that the options name, whose hashes are in the cell's key."""
        return {}

    def tokens(self, length: int, K: int, start_rule: StartRule) -> int:
        """Tokens of a passage for a length of the spec."""
        return length

    def reading(self, length: int, options: Mapping[str, Any]) -> Reading:
        """How the model reads the vectors of a cell with this length of the spec."""
        return reading_named(self.layout)

    def group_size(self, options: Mapping[str, Any]) -> int:
        """Passages that are crammed into one m together; 0: each passage has its own vectors."""
        return 0

    def crammed_besides(
        self, passages: int, tokens: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        """(number, tokens each) of what a cell crams besides its passages, at the most."""
        return 0, tokens

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The protocol's extra measurements of a passage, by the names of `extras` (JSON values).

        `outcome.vectors` (K, D) are the stored ones; `outcome.scores` holds the bits and margins of
        every predicted position, from the same pass as the row's other figures. Raises MemvecError
        for a model that the protocol cannot measure.
        """
        return {}

    def extra_of_cell(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        recipe: Recipe,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """`extra`; a protocol that crams again, and so needs the cell's recipe, overrides this."""
        return self.extra(lm, sourced, outcome, start_rule, options)

    def between(
        self,
        lm: FrozenLM,
        passage: Passage,
        a: Tensor,
        b: Tensor,
        start_rule: StartRule,
    ) -> list[float]:
        """Measure two restarts of a passage, from their vectors `a` and `b` (K, D).

        Only protocols with `compares_restarts` have it, and `recompute_between`.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ the slow check

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        """Recompute `extra` slowly and independently, and pair it with the stored values.

        Malformed `stored` values raise ValueError, TypeError, KeyError or AttributeError.
        """
        return []

    def inputs_at_once(
        self, predicted: int, length: int, options: Mapping[str, Any]
    ) -> list[int] | None:
        """The vector of each input of a one-step forward pass for `predicted` tokens.

        The last outputs predict the tokens. None where tokens are read one after the other.
        """
        if self.layout == "prefix":
            return None
        return [min(i, 1) for i in range(predicted)]

    def recompute_between(
        self, lm: FrozenLM, ids: tuple[int, ...], a: Tensor, b: Tensor, start_rule: str
    ) -> tuple[list[float], list[float]]:
        """Recompute `between` slowly: (values, how far each may differ)."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the report

    def capacity(self, rows: pd.DataFrame) -> Capacity | None:
        """Decoding capacity from rows of one model, source and K; None if no rule counts it."""
        return None

    def gains(self, rows: pd.DataFrame) -> Gains | None:
        """Gains from rows of one model, source and K; None if the protocol has no rule for them."""
        if not self.measures_horizon:
            return None
        longest = rows[rows["length"] == rows["length"].max()]
        bits, tokens = (longest[c].tolist() for c in ("horizon_gain", "horizon_token_gain"))
        return Gains(bits, tokens, "exact horizon, longest length", longest["number"].tolist())

    def cards(self, data: Data) -> list[Card]:
        """The numbers at the top of the report page."""
        return []

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        """Tables of this protocol's rows. `compare`: published values in extra columns."""
        return []

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        """Figures of this protocol's rows. `compare`: published values as extra series."""
        return []


def missing_file(what: str, path: str, maker: str) -> str | None:
    """A sentence if the file at `path` is missing; `maker` is the command that makes it."""
    if path_of(path).is_file():
        return None
    return f"there is no {what} {path}: make one with {maker}."


def own_bos(lm: FrozenLM, ids: Sequence[int], given: int) -> int:
    """1 if a passage begins with a predicted BOS, which is given in H_LM: no bits, and a hit."""
    return int(not given and ids[0] == lm.bos_id)


def bits_after(
    lm: FrozenLM, prefix: Sequence[int], ids: Sequence[int], given: int
) -> tuple[float, int]:
    """(bits, arg-max hits) of the tokens ids[given:] after [prefix, ids[:given]], no vectors.

    They are computed by the model's own forward without a BOS; one that the passage begins with is
    given, as in H_LM. Raises ValueError if no token precedes the first predicted one.
    """
    own = own_bos(lm, ids, given)
    ids = ids[own:]
    whole = [*prefix, *ids]
    n = len(ids) - given
    if len(whole) == len(ids) and given == 0:  # no token precedes the first one
        raise ValueError("the first token needs something before it")
    with torch.no_grad():
        table = torch.tensor([whole], device=lm.device)
        logits = lm.own_logits(table)[:, -n - 1 : -1]
        truth = table[:, -n:]
        bits = float(metrics.surprisal(logits, truth).double().sum())
        right = int((metrics.margins(logits, truth) > 0).sum())
    return bits, right + own


def extra_of(rows: pd.DataFrame, protocol: str, name: str) -> list[Any]:
    """The extra measurement `name` of each row.

    Raises MemvecError for rows of an earlier memvec that lack it.
    """
    extras = [read_json(extra) for extra in rows["extra"]]
    if any(name not in extra for extra in extras):
        raise MemvecError(
            f"rows of protocol '{protocol}' have no '{name}': an earlier memvec measured something "
            "else, so run the study again into another folder, or report it with the memvec that "
            "made it."
        )
    return [extra[name] for extra in extras]


def bits_and_hits(
    name: str, stored: Any, recomputed: tuple[float, int], passage: SlowPassage
) -> Compared:
    """Stored and recomputed [bits, arg-max hits]; ties may change one hit in twenty."""
    bits, hits = stored
    n = len(passage.lm_bits)
    again = [recomputed[0], float(recomputed[1])]
    return Compared(name, [float(bits), float(hits)], again, [passage.bits_tolerance, 0.05 * n + 1])
