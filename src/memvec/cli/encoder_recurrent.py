"""What `memvec encoder` prints of recurrent encoders: the tables of --segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memvec.encoders.recurrent_measure import SegmentComparison

LAG_COLUMNS = ("lag", "exact", "leading tokens", "teacher-forced", "crammed alone: exact")
CHAIN_COLUMNS = (
    *("segments", "carried: tokens per vector", "crammed whole: tokens per vector"),
    *("crammed whole: exact", "crammed alone: tokens per vector", "vectors"),
)


def print_segments(name: str, comparison: SegmentComparison) -> None:
    """Two tables: the longest chain by lag, and what is left of each chain."""
    from memvec.cli.display import columns_table, out

    n, T, K = comparison.documents, comparison.segment, comparison.vectors
    longest = comparison.chains[-1].segments
    alone = _exact(comparison.alone, T)
    title = f"After {longest} segments of {T} tokens in {K} vectors, {name}, n {n}"
    table = columns_table(title, LAG_COLUMNS)
    for row in (row for row in comparison.lags if row.segments == longest):
        table.add_row(
            str(row.lag),
            _exact(row.leading, T),
            _mean(row.leading),
            f"{sum(row.right) / (n * T):.0%}",
            alone,
        )
    out.print(table)
    table = columns_table(f"What {K} vectors hold, n {n}", CHAIN_COLUMNS)
    tokens_alone = _mean([(t if t == T else 0) / K for t in comparison.alone])
    for chain in comparison.chains:
        table.add_row(
            str(chain.segments),
            _mean([t / K for t in chain.exact_tokens]),
            _mean([t / K for t in chain.whole]),
            _exact(chain.whole, chain.segments * T),
            tokens_alone,
            str(K * chain.segments),
        )
    out.print(table)
    out.print(
        "Carried: tokens of the segments that come back whole, over all lags asked. Crammed whole: "
        "leading tokens of the chain in the same K vectors. Crammed alone: K vectors a segment. "
        "Exact is decided by free decoding; 95 % intervals over documents, and of what is crammed "
        "alone over segments."
    )


def _exact(leading: Sequence[int], tokens: int) -> str:
    """The share of passages that come back whole, with its interval; a dash for none measured."""
    from memvec.statistics import share_interval

    return str(share_interval(sum(t == tokens for t in leading), len(leading))) if leading else "–"


def _mean(values: Sequence[float | int]) -> str:
    """A mean with the half width of its 95 % interval; a dash for none measured."""
    from memvec.statistics import mean_interval

    if not values:
        return "–"
    interval = mean_interval(list(values))
    half = f" ± {interval.high - interval.mean:.1f}" if interval.n > 1 else ""
    return f"{interval.mean:.1f}{half}"
