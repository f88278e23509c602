"""A table with its title, note and cells, written as Markdown, LaTeX or CSV by pandas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

TableCell = str | float | int | None

_MARKDOWN = str.maketrans({"|": r"\|", "\n": " "})
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

    def shown(self) -> list[list[str]]:
        """Cells as text."""
        return [[show(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """A Markdown table in GitHub's syntax, with title and note."""
        columns = [name.translate(_MARKDOWN) for name in self.columns]
        rows = [[cell.translate(_MARKDOWN) for cell in row] for row in self.shown()]
        frame = pd.DataFrame(rows, columns=columns, dtype=object)
        body = frame.to_markdown(index=False, tablefmt="github", disable_numparse=True)
        return f"### {self.title}\n\n{body}\n\n{self.note}\n"

    def latex(self) -> str:
        """A booktabs table."""
        columns = [_tex(name) for name in self.columns]
        rows = [[_tex(cell) for cell in row] for row in self.shown()]
        frame = pd.DataFrame(rows, columns=columns, dtype=object)
        text = frame.to_latex(
            index=False,
            escape=False,  # pandas leaves the caption and signs such as ± as they are
            caption=_tex(f"{self.title}. {self.note}"),
            label=f"tab:{self.key}",
            column_format="l" * len(columns),
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
    return str(cell)


def mean_and_sd(pair: tuple[float, float | None] | None) -> str | None:
    """A published mean with its standard deviation, where that is published."""
    if pair is None:
        return None
    mean, sd = pair
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def _tex(text: str) -> str:
    return text.translate(_LATEX)
