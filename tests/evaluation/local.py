"""Data of the tasks of tests/test_evaluate.py: four questions with the same four choices."""

import datasets

WORDS = ["fox", "dog", "cat", "mat"]
ROWS = [
    {"asked": f"the {WORDS[i - 1]}", "choices": WORDS, "right": i, "word": word}
    for i, word in enumerate(WORDS)
]


def documents(**_):
    rows = datasets.Dataset.from_list(ROWS)
    return {"train": rows, "test": rows}
