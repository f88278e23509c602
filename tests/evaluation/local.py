"""Data of the tests' own tasks: few words, with worked examples for a context."""

import datasets

WORDS = ["fox", "dog", "cat", "mat"]
ROWS = [
    {
        "asked": f"the {word} and the {WORDS[i - 1]}",
        "choices": WORDS,
        "right": i,
        "word": word,
        "words": [word, "fox"],
    }
    for i, word in enumerate(WORDS)
]


def documents(**_):
    rows = datasets.Dataset.from_list(ROWS)
    return {"train": rows, "test": rows}
