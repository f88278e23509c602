"""Spread over seeds: the same passages crammed again from other first vectors.

Other tables average the restarts of a passage first, so that n is the number of passages. This one
keeps the seeds apart: each has its own Max and its own mean gains over passages, and their standard
deviation estimates how much a repetition of the whole study would differ.
"""

from __future__ import annotations

from memvec.lab.protocols.paper import paper_result
from memvec.lab.report.data import Data, by_series
from memvec.lab.report.table import Table, TableLine, with_sd
from memvec.statistics import mean_interval


def seeds_table(data: Data) -> Table:
    """One line for each model, series and K of the paper protocol that has several seeds.

    Only the lengths that all of its seeds have are used.
    """
    lines: list[TableLine] = []
    for (model, source, K), group in by_series(data.restarts("paper")):
        seeds = sorted(group["seed"].unique())
        if len(seeds) < 2:
            continue
        counts = group.groupby("length")["seed"].nunique()
        shared = group[group["length"].isin(counts[counts == len(seeds)].index)]
        if shared.empty:
            continue
        results = [paper_result(part) for _, part in shared.groupby("seed")]
        # A seed without a passage that filled its vectors has no mean.
        gains, bits = (
            mean_interval([m.mean for m in means if m.n])
            for means in ([r.token_gain for r in results], [r.information_gain for r in results])
        )
        accuracy = mean_interval(shared.groupby("seed")["accuracy"].mean().tolist())
        lines.append(
            [
                ("model", model),
                ("source", source),
                ("K", K),
                ("seeds", len(seeds)),
                ("Max of each seed", ", ".join(str(r.longest or "–") for r in results)),
                *with_sd("token gain", gains, "sd over seeds"),
                *with_sd("bits", bits, "sd over seeds"),
                *with_sd("accuracy", accuracy, "sd over seeds"),
                ("n of each seed", ", ".join(str(r.token_gain.n) for r in results)),
            ]
        )
    return Table.of(
        "seeds",
        "Spread over seeds",
        "Each seed is evaluated by the published rule, at the lengths that all seeds have. Max and "
        "token gain are tokens, bits the information gain; gains and accuracy are means of the "
        "seeds' means, with the standard deviation of these over seeds. n: rows of each seed "
        "whose gains are averaged (a passage counts once for each length).",
        lines,
    )
