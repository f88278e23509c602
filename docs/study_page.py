"""Write the two tables of docs/studies.md, from the sentences of the code itself.

python docs/study_page.py

One has the fields of a spec, the other the columns of an export.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from memvec import registry
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.sources import SOURCES
from memvec.lab.sources.base import Source
from memvec.lab.study.export import CELL_COLUMNS, SETTING_COLUMNS, STORE_COLUMNS
from memvec.lab.study.row import Row
from memvec.lab.study.spec import ModelSpec, RunSpec, Spec

PAGE = Path(__file__).parent / "studies.md"
BEGIN = "<!-- {name}: written by `python docs/study_page.py` -->\n"
END = "<!-- end of {name} -->\n"
TABLES = ("models", "sources", "runs")  # fields of a spec that are tables themselves
ALL = "`[[sources]]`"
UNITS = "bits|hits|logits|nats|passages|seconds|steps|tokens"
KINDS = {bool: "true or false", int: "number", float: "number", dict: "JSON"}


def default(field: FieldInfo) -> str:
    """A field's default as TOML has it; empty if it has none, or only the words of its meaning."""
    if field.is_required():
        return "required"
    value: Any = list(field.default) if isinstance(field.default, tuple) else field.default
    return "" if value in (None, "", [], {}) else f"`{json.dumps(value)}`"


def fields() -> Iterator[tuple[str, str, str, str]]:
    """(where it stands, name, default, meaning) of every field of a spec, in its order."""
    for where, model in (("top", Spec), ("`[[models]]`", ModelSpec)):
        for name, field in model.model_fields.items():
            if name not in TABLES:
                yield where, name, default(field), str(field.description)
    for name, field in Source.model_fields.items():
        yield ALL, name, default(field), str(field.description)
    kinds: dict[tuple[str, str], list[str]] = {}
    of_kind: dict[str, FieldInfo] = {}
    for kind, source in SOURCES.items():
        for name, field in source.model_fields.items():
            if name not in Source.model_fields:
                sentence = str(field.description or of_kind[name].description)
                kinds.setdefault((name, sentence), []).append(kind)
                of_kind.setdefault(name, field)
    for (name, sentence), of in kinds.items():
        only = ", ".join(f"`{kind}`" for kind in of)
        field = SOURCES[of[0]].model_fields[name]
        yield f"{ALL} of kind {only}", name, default(field), sentence
    for name, field in RunSpec.model_fields.items():
        yield "`[[runs]]`", name, default(field), str(field.description)
    for protocol in registry.BUILT_IN["protocol"]:
        for name, field in protocol_of(protocol).Options.model_fields.items():
            where = f"`[[runs]]` of protocol `{protocol}`"
            yield where, name, default(field), str(field.description)


# ---------------------------------------------------------------------- the columns


def unit(sentence: str, kind: Any = None) -> str:
    """The unit that a column's sentence names: after its last comma, inside its brackets or as its
    first noun; else what kind of value it is."""
    if after := re.search(rf", ({UNITS}|text|number)(?: \([^)]*\))?(?:;|$)", sentence):
        return after[1]
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
    for name, sentence in SETTING_COLUMNS.items():
        yield name, "text", sentence, "all"
    for name, field in Row.model_fields.items():
        if name != "extra":
            sentence = str(field.description)
            yield name, unit(sentence, field.annotation), sentence, "all"
    for protocol in registry.BUILT_IN["protocol"]:
        for name, sentence in protocol_of(protocol).extras.items():
            yield f"extra: {name}", unit(sentence, dict), sentence, f"`{protocol}`"
    for name, sentence in STORE_COLUMNS.items():
        yield name, unit(sentence, bool if name == "planned" else None), sentence, "all"


def field_lines() -> Iterator[str]:
    """A Markdown table with a line for each field."""
    yield "| where | field | default | meaning |\n|---|---|---|---|"
    for where, name, value, text in fields():
        yield f"| {where} | `{name}` | {value} | {text} |"


def column_lines() -> Iterator[str]:
    """A Markdown table with a line for each column."""
    yield "| column | unit | meaning | protocols |\n|---|---|---|---|"
    for name, measured_in, sentence, protocols in columns():
        meaning = sentence.replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{name}` | {measured_in} | {meaning} | {protocols} |"


def page() -> str:
    """The page with today's tables between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("fields", field_lines()), ("columns", column_lines())):
        begin, end = BEGIN.format(name=name), END.format(name=name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        table = "\n".join(lines)
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
