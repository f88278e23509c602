"""Dataclasses of tensors that share their first axis, with one row for each slot of the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

R = TypeVar("R", bound="Rows")


@dataclass
class Rows:
    """The base of per-slot state: of the batch, a schedule, an optimiser or a term.

    A subclass is a dataclass. Each field is a tensor whose first axis is B, or another `Rows`. This
    class selects and appends rows of all fields.
    """

    def take(self: R, index: Int[Tensor, " n"]) -> R:
        """Copies of the rows at `index`, in its order."""
        taken = {
            name: rows.take(index) if isinstance(rows, Rows) else rows.index_select(0, index)
            for name, rows in self._fields().items()
        }
        return type(self)(**taken)

    def joined(self: R, other: R) -> R:
        """The rows of `self`, then the rows of `other`."""
        joined = {}
        for name, rows in self._fields().items():
            new = getattr(other, name)
            joined[name] = rows.joined(new) if isinstance(rows, Rows) else torch.cat([rows, new])
        return type(self)(**joined)

    def is_complete(self, B: int) -> bool:
        """True if the object has no attributes but its fields, and B rows in each field."""
        values = self._fields()
        return vars(self).keys() == values.keys() and all(len(v) == B for v in values.values())

    def __len__(self) -> int:
        return next((len(field) for field in self._fields().values()), 0)

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


def with_padding(rows: Tensor, padding_rows: int, value: float = 0.0) -> Tensor:
    """Rows (B, ...) followed by `padding_rows` rows that are filled with `value`."""
    if not padding_rows:
        return rows
    return torch.cat([rows, rows.new_full((padding_rows, *rows.shape[1:]), value)])
