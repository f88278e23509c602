"""Write the table of a spec's fields in docs/studies.md from the fields' own sentences.

python docs/study_fields.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from memvec import registry
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.sources import SOURCES
from memvec.lab.sources.base import Source
from memvec.lab.study.spec import ModelSpec, RunSpec, Spec

PAGE = Path(__file__).parent / "studies.md"
BEGIN = "<!-- fields: written by `python docs/study_fields.py` -->\n"
END = "<!-- end of fields -->\n"
TABLES = ("models", "sources", "runs")  # fields of a spec that are tables themselves
ALL = "`[[sources]]`"


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


def table() -> str:
    """The section between the marks: a Markdown table with a line for each field."""
    lines = ["| where | field | default | meaning |", "|---|---|---|---|"]
    lines += [f"| {where} | `{name}` | {value} | {text} |" for where, name, value, text in fields()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with today's table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
