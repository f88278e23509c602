"""A table with its title, note and cells, written as Markdown, LaTeX or CSV by pandas.

A line is a list of pairs, so that the title of a column stands beside its cell:

    line = [
        ("model", model),
        *interval("exact tokens", mean_interval(horizons)),  # and its columns "low" and "high"
        ("n", len(horizons)),
    ]
    Table.of("mine", "Exact horizons", "Means over n passages with 95 % intervals.", [line])
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import pandas as pd

from memvec.errors import MemvecError, printable
from memvec.statistics import Difference, Mean

TableCell = str | float | int | None
TableLine = list[tuple[str, TableCell]]  # (title of a column, cell), from left to right

_MARKDOWN = re.compile(r"\||<(?=[A-Za-z/!?])")  # ends a cell, or begins a tag of HTML
_LATEX = str.maketrans(
    {
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        **{"±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "−": "$-$", "·": r"$\cdot$"},
        **{"×": r"$\times$", "→": r"$\to$", "–": "--", "…": r"\ldots{}"},
    }
)


@dataclass(frozen=True)
class Table:
    """A table with a key (its file name), a title, and a note that explains the columns."""

    key: str
    title: str
    note: str
    columns: list[str]
    rows: list[list[TableCell]]

    @classmethod
    def of(cls, key: str, title: str, note: str, lines: Sequence[TableLine]) -> Table:
        """A table from its lines, whose titles are the columns; several may have one title.

        Raises MemvecError if a line has other titles than the first.
        """
        columns = [name for name, _ in lines[0]] if lines else []
        for line in lines:
            if (titles := [name for name, _ in line]) != columns:
                raise MemvecError(
                    f"the lines of table '{key}' differ: the first has the columns {columns}, "
                    f"another {titles}; give every line the same."
                )
        return cls(key, title, note, columns, [[cell for _, cell in line] for line in lines])

    def shown(self) -> list[list[str]]:
        """Cells as text."""
        return [[show(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """A Markdown table in GitHub's syntax, with title and note."""
        columns = [_MARKDOWN.sub(r"\\\g<0>", name) for name in self.columns]
        rows = [[_MARKDOWN.sub(r"\\\g<0>", cell) for cell in row] for row in self.shown()]
        frame = pd.DataFrame(rows, columns=columns, dtype=object)
        body = frame.to_markdown(index=False, tablefmt="github", disable_numparse=True)
        return f"### {self.title}\n\n{body}\n\n{self.note}\n"

    def latex(self) -> str:
        """A table in LaTeX, for the package booktabs; columns of numbers end at the right."""
        columns = [_tex(name) for name in self.columns]
        rows = [
            [_tex(show(c).replace("-", "−") if _is_number(c) else show(c)) for c in row]
            for row in self.rows
        ]
        frame = pd.DataFrame(rows, columns=columns, dtype=object)
        sides = [
            "r" if all(_is_number(r[i]) for r in self.rows) else "l" for i in range(len(columns))
        ]
        text = frame.to_latex(
            index=False,
            escape=False,  # pandas leaves the caption and signs such as ± as they are
            caption=_tex(f"{self.title}. {self.note}"),
            label=f"tab:{self.key}",
            column_format="".join(sides),
        )
        return str(text).replace("\\begin{table}", "\\begin{table}\n\\centering", 1)

    def csv(self) -> str:
        """Comma-separated, numbers unrounded."""
        frame = pd.DataFrame(self.rows, columns=self.columns, dtype=object)
        return str(frame.to_csv(index=False, lineterminator="\n"))


def show(cell: TableCell) -> str:
    """A cell as text: three decimals below 1, one above; an en dash for what is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.1f}"
    return printable(str(cell))


def interval(
    title: str, estimate: Mean | Difference | tuple[TableCell, TableCell, TableCell]
) -> TableLine:
    """Three columns: an estimate under `title`, and the ends of its interval, 'low' and 'high'.

    A tuple is (estimate, low, high), as `memvec.statistics.Interval` is.
    """
    if isinstance(estimate, Mean):
        return [(title, estimate.mean), ("low", estimate.low), ("high", estimate.high)]
    value, low, high, *_ = estimate
    return [(title, value), ("low", low), ("high", high)]


def with_sd(title: str, mean: Mean | None, sd: str = "sd") -> TableLine:
    """Two columns: a mean under `title`, and the standard deviation of its values under `sd`."""
    return [(title, mean.mean), (sd, mean.sd)] if mean else [(title, None), (sd, None)]


def mean_and_sd(pair: tuple[float, float | None] | None) -> str | None:
    """A published mean with its standard deviation, where that is published."""
    if pair is None:
        return None
    mean, sd = pair
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def _is_number(cell: TableCell) -> bool:
    """True for a number, and for what is missing."""
    return cell is None or isinstance(cell, Real)


def _tex(text: str) -> str:
    return text.translate(_LATEX)
