"""Tables of usable vectors: how well they stand for their texts, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from memvec.cli.display import columns_table, facts_table, out, safe
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.vectors import MemVectors

MEASURED = {
    "continuation": "passages, on their true continuations",
    "held_out": "passages, on sampled continuations",
    "in_a_row": "texts of several passages, their vectors in a row, on sampled continuations",
}


def stored_use(mem: MemVectors, file: str) -> dict[str, Any] | None:
    """The certificate of use in a file, if there is one. Raises MemvecError for a damaged one."""
    from memvec.usable.certificate import UseCertificate

    if mem.header.use is None:
        return None
    try:
        return UseCertificate.model_validate(mem.header.use).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MemvecError(
            f"{file} has a certificate of use that is damaged ({where}: {first['msg']}): measure "
            f"it again with memvec verify --use."
        ) from None


def show_use(use: Mapping[str, Any]) -> None:
    """Print a certificate of use: how well each context stands for the text, on held-out words."""
    K, scale = use["vectors"], float(use.get("context_scale", 1.0))
    where = "As context" if scale == 1 else f"As context, the vectors times {scale:g}"
    for key, words in MEASURED.items():
        measured = use.get(key)
        if not measured:
            continue
        title = (
            f"{where}: {words} (n {measured['passages']}, {measured['queries']} x "
            f"{measured['tokens']} tokens, {K} vectors for each passage)"
        )
        columns = ("context", "KL to the text, nats a token", "share of the gain kept")
        table = columns_table(title, columns, left="context")
        for name, c in measured["contexts"].items():
            kl = _with_interval(c["kl"], c["kl_interval"], 3)
            some = f" (n {c['passages']})" if c.get("passages") else ""
            table.add_row(safe(name) + some, kl, _with_interval(c["kept"], c["kept_interval"], 2))
        out.print(table)


def _with_interval(value: Any, interval: Sequence[Any], digits: int) -> str:
    """A figure with its interval; alone where one passage gave none. JSON has NaN as a word."""
    low, high = map(float, interval)
    shown = f"{float(value):.{digits}f}"
    return shown if math.isnan(low) else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def show_answers(written: Mapping[str, str]) -> None:
    """Print what was written after each context."""
    table = facts_table("")
    for context, text in written.items():
        table.add_row(context, "\n".join(safe(line) for line in text.splitlines()))
    out.print(table)
