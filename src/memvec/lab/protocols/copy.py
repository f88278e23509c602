"""A vector against the text itself, repeated in context (`ablations_repeat_text.ipynb`).

The prompt is "text: X, repeat previous text: X", and the measure is how many bits of the second X
are left when X has just been read. The paper compares this with the bits that vectors leave. As
there, the words and the first X are tokenized as one text, the second X keeps the passage's tokens,
and a BOS is put in front where the tokenizer adds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from memvec.cramming.outcomes import Outcome
from memvec.lab.protocols.protocol import (
    Compared,
    Protocol,
    bits_after,
    bits_and_hits,
    extra_of,
    own_bos,
)
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_length, by_recipe, panel_title, place
from memvec.lab.report.plot import Panel, Plot, Series, cloud, diagonal
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import mean_interval

MIN_ACCURACY = 0.99  # accuracy of the passages that the paper compares
BEFORE, BETWEEN = "text: ", "\nrepeat previous text: "


class Copy(Protocol):
    """Bits of a passage after the same passage in context, beside those after vectors."""

    extras = {  # noqa: RUF012
        "after_copy": "[bits of the passage, arg-max hits] after the same passage in context, no "
        "vectors"
    }

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        ids, prefix = sourced.passage.ids, _prefix(lm, sourced.passage.ids)
        if _too_long(lm, prefix, ids):
            return {"after_copy": None}
        return {"after_copy": list(bits_after(lm, prefix, ids, int(start_rule == "first-token")))}

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        prefix = _prefix(passage.lm, passage.ids)
        if _too_long(passage.lm, prefix, passage.ids):
            return [Compared("copy", [] if stored["after_copy"] is None else [1.0], [], [])]
        pair = stored["after_copy"] or (float("nan"), float("nan"))
        return [bits_and_hits("copy", pair, passage.bits_after(prefix), passage)]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for key, everything in by_length(data.of(self.name)):
            copied = _with_copies(everything)
            accurate = copied[copied["accuracy"] >= MIN_ACCURACY]
            parts = {"all": copied, f"accuracy ≥ {MIN_ACCURACY}": accurate}
            for name, group in parts.items():
                if not len(group) or (name != "all" and len(accurate) == len(copied)):
                    continue
                by_vectors, by_copy, accuracy, right = (
                    mean_interval(values.tolist())
                    for values in (
                        group["information_gain"],
                        group["copy_gain"],
                        group["accuracy"],
                        group["copy_hits"] / group["predicted"],
                    )
                )
                lines.append(
                    [
                        *place(*key),
                        ("passages", name),
                        ("H, bits", float(group["lm_bits"].mean())),
                        *interval("removed by vectors", by_vectors),
                        *interval("removed by copy", by_copy),
                        *interval("accuracy, vectors", accuracy),
                        *interval("accuracy, copy", right),
                        ("n", len(group)),
                    ]
                )
        note = (
            "Means over n passages with their 95 % intervals (Student's t); H: mean bits without "
            "vectors. In the copy columns the model has read the same passage directly before. The "
            "paper "
            f"compares passages whose vectors reach an accuracy of {MIN_ACCURACY}."
        )
        return [Table.of("copy", "A vector against the text repeated in context", note, lines)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels = []
        for (model, K, recipe), everything in by_recipe(data.of(self.name)):
            group = _with_copies(everything)
            if group.empty:
                continue
            series = [
                cloud("vector", group, "lm_bits", "information_gain"),
                cloud("copy in context", group, "lm_bits", "copy_gain"),
                diagonal(group["lm_bits"]),
            ]
            if compare and K == 1 and "random-words" in set(group["source"]):
                series += _published(data.published_as(str(model)))
            title = panel_title(model, K, recipe)
            panels.append(Panel(title, "bits without either, H", "bits removed", series))
        caption = "One point per passage. On the dashed line all bits of the passage are removed."
        return [Plot("copy", "A vector against the text itself in context", caption, panels)]


def _published(model: str) -> list[Series]:
    """The paper's eight random passages of this model, nats converted to bits."""
    known = published.published()["copy"]["values"].get(model)
    if known is None:
        return []
    H, *removed = (
        [published.bits(nats) for nats in known[key]]
        for key in ("nats", "removed_by_vector", "removed_by_copy")
    )
    names = ("vector, published", "copy in context, published")
    return [Series(name, H, values) for name, values in zip(names, removed, strict=True)]


def _prefix(lm: FrozenLM, ids: tuple[int, ...]) -> list[int]:
    if lm.tokenizer is None:
        return list(ids)
    head = [lm.bos_id] if lm.adds_bos and lm.bos_id is not None else []
    return [*head, *lm.tokenize(BEFORE + lm.text(ids[own_bos(lm, ids, 0) :]) + BETWEEN)]


def _too_long(lm: FrozenLM, prefix: list[int], ids: tuple[int, ...]) -> bool:
    return lm.context is not None and len(prefix) + len(ids) > lm.context


def _with_copies(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose copy fits the context, with columns `copy_gain` (bits) and `copy_hits`."""
    copies = extra_of(rows, "copy", "after_copy")
    kept = np.array([copy is not None for copy in copies], dtype=bool)
    pairs = [copy for copy in copies if copy is not None]
    return rows[kept].assign(
        copy_gain=lambda part: part["lm_bits"] - [bits for bits, _ in pairs],
        copy_hits=[hits for _, hits in pairs],
    )
