"""Tables and figures of the protocol 'sentences': bits each way, how far ahead, and the cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from memvec.lab.protocols.protocol import Card, extra_of
from memvec.lab.report.data import Data, averaged, short
from memvec.lab.report.plot import Mark, Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.sentences.cutting import last_sentences
from memvec.lab.sentences.evaluate import WAYS
from memvec.lab.sentences.flops import COSTS
from memvec.statistics import Interval, paired_difference, ratio_of_means, share_interval

SAVING = ("nothing", "predicted", "crammed", "text", "full")  # ways whose saved bits are drawn


class Group(NamedTuple):
    """The sentences of one model, source, limit, K, latent model and context.

    `bits`: bits of each sentence's tokens, by way. `ahead`: bits by regime, for predictions 1, 2,
    ... sentences ahead.
    """

    name: str
    label: str  # the latent model's file, without its folder and kind
    rows: pd.DataFrame
    tokens: list[float]
    bits: dict[str, list[float]]
    ahead: dict[str, list[list[float]]]

    def per_token(self, bits: Sequence[float]) -> Interval:
        """Bits per token: ratio of sums, with its 95 % bootstrap interval over sentences."""
        return ratio_of_means(bits, self.tokens)

    def gained(self, way: str) -> Interval:
        """Bits that a way saves over `alone`, divided by those that the text before saves."""
        alone = np.array(self.bits["alone"])
        saved, by_text = (alone - np.array(self.bits[name]) for name in (way, "text"))
        return ratio_of_means(saved.tolist(), by_text.tolist())


def groups_of(data: Data, protocol: str) -> Iterator[Group]:
    """The groups of a study's rows, in the order of the spec."""
    rows = data.restarts(protocol)
    for key in ("latents", "context"):
        rows = rows.assign(**{f"_{key}": data.option(rows, key)})
    rows = rows.assign(_line=data.series_without(rows, "latents", "context"))
    keys = ["model", "_line", "length", "vectors", "_latents", "_context"]
    for (model, source, length, K, file, context), whole in rows.groupby(keys, sort=False):
        part = averaged(whole)
        measured = extra_of(part, protocol, "bits")
        bits = {"alone": part["lm_bits"].tolist(), "own": part["mem_bits"].tolist()}
        bits |= {way: [float(b[way]) for b in measured] for way in measured[0]}
        ahead = {}
        for regime, first in (("continuous", "predicted"), ("discretised", "discretised")):
            further = [list(map(float, row)) for row in extra_of(part, protocol, regime)]
            ahead[regime] = [bits[first], *map(list, zip(*further, strict=True))]
        label = short(str(file)).removesuffix(".safetensors")
        name = f"{label} ({model}, {source}, K = {K}, up to {length} tokens, "
        name += f"{context} before)"
        yield Group(name, label, part, part["tokens"].astype(float).tolist(), bits, ahead)


def cards(data: Data, protocol: str) -> list[Card]:
    """The share of the text's savings that each latent model's prediction saves."""
    shares = [(group.name, group.gained("predicted")) for group in groups_of(data, protocol)]
    return [
        Card(
            f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]",
            "of the bits that the text of the sentences before saves, saved by the predicted "
            f"latent ({name})",
        )
        for name, share in shares
    ]


def tables(data: Data, protocol: str) -> list[Table]:
    """Tables of the bits by way, of sentences ahead, of operations, and of exact latents."""
    groups = list(groups_of(data, protocol))
    return [_ways(groups), _ahead(groups), _flops(groups, protocol), _exact(data, groups, protocol)]


def _ways(groups: list[Group]) -> Table:
    lines: list[TableLine] = []
    for group in groups:
        for way, meaning in WAYS.items():
            value = group.per_token(group.bits[way])
            saved = paired_difference(group.bits["alone"], group.bits[way])
            lines.append(
                [
                    ("latent model", group.name),
                    ("in front of the sentence", meaning),
                    *interval("bits / token", value),
                    ("perplexity", 2**value.value),
                    *interval("bits saved", saved),
                    *interval("of what its text saves", group.gained(way)),
                    ("n", len(group.tokens)),
                ]
            )
    note = (
        "Bits per token of the true next sentence under the frozen model: sum of bits over sum of "
        "tokens, with the 95 % bootstrap interval over n sentences; perplexity: 2 to that power. "
        "Saved: bits that a sentence costs less than after the start token alone, mean with its "
        "95 % interval (paired, Student's t); and the ratio of these bits to those that the text "
        "of the same sentences saves (bootstrap)."
    )
    return Table.of("sentences", "The next sentence, each way", note, lines)


def _ahead(groups: list[Group]) -> Table:
    lines: list[TableLine] = [
        [
            ("latent model", group.name),
            ("regime", regime),
            ("sentences ahead", step),
            *interval("bits / token", group.per_token(bits)),
            ("n", len(group.tokens)),
        ]
        for group in groups
        for regime, by_step in group.ahead.items()
        for step, bits in enumerate(by_step, 1)
    ]
    note = (
        "Bits per token with the 95 % bootstrap interval over n sentences. Continuous: predictions "
        "are fed back unchanged. Discretised: each prediction, the last one too, is written as a "
        "sentence and encoded again."
    )
    return Table.of("sentences-ahead", "Predicted further ahead", note, lines)


def _flops(groups: list[Group], protocol: str) -> Table:
    lines: list[TableLine] = []
    for group in groups:
        every = extra_of(group.rows, protocol, "flops")
        text = [float(row["text"]) for row in every]
        for way, meaning in COSTS.items():
            operations = [float(row[way]) for row in every]
            lines.append(
                [
                    ("latent model", group.name),
                    ("the next sentence", meaning),
                    ("million operations", sum(operations) / len(operations) / 1e6),
                    *interval("of the first", ratio_of_means(operations, text)),
                    ("n", len(operations)),
                ]
            )
    note = (
        "Computed from shapes (memvec.lab.sentences.flops), mean over n sentences; the ratio to "
        "the first line has a 95 % bootstrap interval. The operations that read or encoded the "
        "earlier sentences are not counted."
    )
    return Table.of("sentences-flops", "Operations", note, lines)


def _exact(data: Data, groups: list[Group], protocol: str) -> Table:
    lines: list[TableLine] = []
    for group in groups:
        own_encoded, n = extra_of(group.rows, protocol, "encoded_exact"), len(group.rows)
        decodes = _before_exact(data, group.rows, protocol).values()
        encoded, crammed = (sum(flags[i] for flags in decodes) for i in range(2))
        counts = (
            ("the sentence, encoded", sum(map(int, own_encoded)), n),
            ("the sentence, crammed", round(float(group.rows["exact"].sum())), n),
            ("sentences before, encoded", encoded, len(decodes)),
            ("sentences before, crammed", crammed, len(decodes)),
        )
        for what, k, m in counts:
            exact = str(share_interval(k, m))
            lines.append([("latent model", group.name), ("of", what), ("exact", exact), ("n", m)])
    note = (
        "Share of latents from which the sentence decodes whole; 95 % Wilson intervals. A sentence "
        "that stands before several others counts once."
    )
    return Table.of("sentences-exact", "Latents that decode", note, lines)


def _before_exact(
    data: Data, rows: pd.DataFrame, protocol: str
) -> dict[tuple[int, ...], tuple[int, int]]:
    """For each sentence before: whether its (encoded, crammed) latent decodes exactly, 0 or 1.

    The keys are token ids, so that a sentence of several rows, whose latent is the same, is there
    once.
    """
    decodes: dict[tuple[int, ...], tuple[int, int]] = {}
    measured = (extra_of(rows, protocol, name) for name in ("sizes", "before_exact"))
    places = zip(rows["cell"], rows["number"], strict=True)
    for (cell, number), sizes, flags in zip(places, *measured, strict=True):
        text = data.store.passage(str(cell), int(number)).before
        for ids, (encoded, crammed) in zip(last_sentences(text, sizes), flags, strict=True):
            decodes.setdefault(ids, (int(encoded), int(crammed)))
    return decodes


def figures(data: Data, protocol: str) -> list[Plot]:
    """Panels of the bits by way, of the bits saved, and of sentences ahead."""
    groups = list(groups_of(data, protocol))
    if not groups:
        return []
    ways = [_series(g.label, g, [g.bits[way] for way in WAYS], "points") for g in groups]
    panels = [Panel("in front of the sentence", "", "bits per token", ways, list(WAYS))]
    saving = [_saved(g) for g in groups if sum(g.bits["predicted"]) < sum(g.bits["alone"])]
    if saving:
        panels.append(
            Panel("saved against nothing", "", "bits of a sentence", saving, list(SAVING))
        )
    for group in groups:
        steps = len(group.ahead["continuous"])
        if steps == 1:
            continue
        lines = [_series(regime, group, bits, "line") for regime, bits in group.ahead.items()]
        for way in ("alone", "text"):
            level = group.per_token(group.bits[way]).value
            lines.append(Series(way, [0.0, steps - 1.0], [level, level], "dashed"))
        names = [str(step) for step in range(1, steps + 1)]
        panels.append(Panel(group.label, "sentences ahead", "bits per token", lines, names))
    return [Plot("sentences", "Sentence by sentence", " ".join(map(_sentence, groups)), panels)]


def _series(name: str, group: Group, bits: list[list[float]], mark: Mark) -> Series:
    """Bits per token with their intervals; x is the index in `bits`."""
    return estimates(name, range(len(bits)), [group.per_token(b) for b in bits], mark)


def _saved(group: Group) -> Series:
    """Bits of a sentence that each of SAVING saves, with intervals."""
    values = [paired_difference(group.bits["alone"], group.bits[way]) for way in SAVING]
    return estimates(group.label, range(len(values)), values, "points")


def _sentence(group: Group) -> str:
    """A sentence on the bits per token of a latent model."""

    def bits_per_token(way: str) -> str:
        v = group.per_token(group.bits[way])
        return f"{v.value:.2f} [{v.low:.2f}, {v.high:.2f}]"

    over = paired_difference(group.bits["nothing"], group.bits["predicted"])
    return (
        f"{group.name}, n {len(group.tokens)}: a token of the next sentence costs "
        f"{bits_per_token('alone')} bits after nothing, {bits_per_token('predicted')} after the "
        f"predicted latent, {bits_per_token('discretised')} when that is written and encoded "
        f"again, {bits_per_token('text')} after the text of the same sentences and "
        f"{bits_per_token('full')} after all that fits; the prediction from no sentence costs "
        f"{bits_per_token('nothing')}, so that the sentences before save "
        f"{over.value:.1f} [{over.low:.1f}, {over.high:.1f}] bits of a sentence through latents. "
        "Intervals: 95 %."
    )
