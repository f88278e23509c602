"""The data of the tasks `cloze` and `cloze_choice`: passages and sentences to complete.

Each document has a passage, an unfinished sentence (`question`), and the word that completes it,
which occurs in the passage. In the task of the choice, three words of the same kind from other
passages are the other choices.
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
        right_place = i % 4  # every place is right equally often
        row["choices"] = [*others[:right_place], row["word"], *others[right_place:3]]
        row["right"] = right_place
    return {"test": datasets.Dataset.from_list(rows)}
