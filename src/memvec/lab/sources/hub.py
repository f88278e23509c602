"""Texts from a data set of the Hugging Face Hub; the two data sets of the paper by their names.

The paper's chunk sets have one split, `train`, of 1000 rows; the chunk is in the column `text`,
beside the row number that pandas wrote. The published runs take the first 50 rows in their order
(Kuratov et al. 2025, `train.py`).
"""

from __future__ import annotations

from typing import Literal

from memvec.lab.sources.written import WrittenTexts


class Hub(WrittenTexts):
    """Any data set of the Hub with a column of texts."""

    kind: Literal["hub"] = "hub"


class Pg19(WrittenTexts):
    """The paper's 1000 chunks of 50 PG-19 validation books."""

    kind: Literal["pg19"] = "pg19"
    dataset: str | None = "yurakuratov/pg19_valid_1k_chunks"


class Fanfics(WrittenTexts):
    """The paper's chunks of 21 fan fictions published after October 2024."""

    kind: Literal["fanfics"] = "fanfics"
    dataset: str | None = "yurakuratov/fanfics_1k_chunks"
