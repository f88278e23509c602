"""Passages with a word that comes back: the data of the tasks `cloze` and `cloze_choice`.

Each document is a passage, a question that breaks off, and the word that it breaks off before,
which occurs in the passage. For the choice, three words of the same kind from other passages stand
beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

FILE = Path(__file__).with_name("cloze.jsonl")


def documents(**_: Any) -> dict[str, datasets.Dataset]:
    """The documents as the harness reads them."""
    rows = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
    for i, row in enumerate(rows):
        others = [
            other["word"]
            for other in [*rows[i + 1 :], *rows[:i]]
            if other["kind"] == row["kind"]
            and other["word"].lower() not in f"{row['passage']} {row['question']}".lower()
        ]
        right = i % 4  # every place is right equally often
        row["choices"] = [*others[:right], row["word"], *others[right:3]]
        row["right"] = right
    return {"test": datasets.Dataset.from_list(rows)}
