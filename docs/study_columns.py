"""Write the table of a study's columns in docs/studies.md from the records' own sentences.

python docs/study_columns.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memvec import registry
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.export import CELL_COLUMNS, STORE_COLUMNS
from memvec.lab.study.row import Row

PAGE = Path(__file__).parent / "studies.md"
BEGIN = "<!-- columns: written by `python docs/study_columns.py` -->\n"
END = "<!-- end of columns -->\n"
UNITS = "bits|hits|logits|nats|passages|seconds|steps|tokens"
KINDS = {bool: "true or false", int: "number", float: "number", dict: "JSON"}


def unit(sentence: str, kind: Any = None) -> str:
    """The unit that a column's sentence names: behind its last comma, inside its brackets or as its
    first noun; else what kind of value it is."""
    if behind := re.search(rf", ({UNITS}|text|number)(?: \([^)]*\))?(?:;|$)", sentence):
        return behind[1]
    if listed := re.search(r"\[(.* .*)\]", sentence):
        units = list(dict.fromkeys(re.findall(rf"\b(?:{UNITS})\b", listed[1])))
        if units:
            return ", ".join(units)
    if noun := re.match(rf"(?:\S+ )?({UNITS})\b", sentence):
        return noun[1]
    if re.search(r"\bshare of\b", sentence):
        return "share"
    return KINDS.get(kind, "text")


def columns() -> Iterator[tuple[str, str, str, str]]:
    """(name, unit, meaning, protocols) of every column of an export, in its order."""
    for name, sentence in CELL_COLUMNS.items():
        kinds = {"vectors": int, "seed": int, "random_text": bool}
        yield name, unit(sentence, kinds.get(name)), sentence, "all"
    for name, field in Row.model_fields.items():
        if name != "extra":
            sentence = str(field.description)
            yield name, unit(sentence, field.annotation), sentence, "all"
    for protocol in registry.BUILT_IN["protocol"]:
        for name, sentence in protocol_of(protocol).extras.items():
            yield f"extra: {name}", unit(sentence, dict), sentence, f"`{protocol}`"
    for name, sentence in STORE_COLUMNS.items():
        yield name, unit(sentence, bool if name == "planned" else None), sentence, "all"


def table() -> str:
    """The section between the marks: a Markdown table with a line for each column."""
    lines = ["| column | unit | meaning | protocols |", "|---|---|---|---|"]
    for name, measured_in, sentence, protocols in columns():
        meaning = sentence.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {measured_in} | {meaning} | {protocols} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with today's table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
