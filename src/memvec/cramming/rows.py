"""Dataclasses of tensors that share their first axis: a row for each slot of the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

R = TypeVar("R", bound="Rows")


@dataclass
class Rows:
    """What the batch, a schedule and an optimiser keep of each slot.

    Every field is a tensor whose first axis is B, or another `Rows`. A subclass names its fields
    and their shapes; taking rows out and putting rows in is done here, once.
    """

    def take(self: R, index: Int[Tensor, " n"]) -> R:
        """Copies of some rows, in the order of the index."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def head(self: R, n: int) -> R:
        """Copies of the first n rows."""
        return self._each(lambda tensor: tensor[:n].clone())

    def joined(self: R, other: R) -> R:
        """These rows with the other's after them."""
        values, other_values = self._fields(), other._fields()
        return type(self)(
            **{
                name: value.joined(other_values[name])
                if isinstance(value, Rows)
                else torch.cat([value, other_values[name]])
                for name, value in values.items()
            }
        )

    def whole(self, B: int) -> bool:
        """True if all that is kept is in the fields, B rows in each."""
        values = self._fields()
        return vars(self).keys() == values.keys() and all(len(v) == B for v in values.values())

    def __len__(self) -> int:
        return next((len(field) for field in self._fields().values()), 0)

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def _each(self: R, change: Any) -> R:
        return type(self)(
            **{
                name: value._each(change) if isinstance(value, Rows) else change(value)
                for name, value in self._fields().items()
            }
        )


def with_padding(rows: Tensor, padding_rows: int, value: float = 0.0) -> Tensor:
    """Rows (B, ...) with `padding_rows` rows of one value after them."""
    if not padding_rows:
        return rows
    return torch.cat([rows, rows.new_full((padding_rows, *rows.shape[1:]), value)])
