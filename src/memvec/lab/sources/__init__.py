"""Sources of passages, one file each; `memvec.registry` lists them under the kind "source".

A source of your own is a class in your own package, and a study names it by its kind:

    from memvec import register
    from memvec.lab.sources import Source

    @register("source", "mine")
    class Mine(Source):
        kind: Literal["mine"] = "mine"
        def passages(self, lm, count, length, base=None): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from memvec import registry
from memvec.errors import did_you_mean
from memvec.lab.sources.base import Source, SourcedPassage, seeded_random

__all__ = ["SOURCES", "AnySource", "Source", "SourcedPassage", "seeded_random"]


def _of_its_kind(value: Any) -> Any:
    """The source that a dictionary with a `kind` describes; other values go to pydantic unchanged.

    An unknown kind is pydantic's error `union_tag_invalid`, a missing one `union_tag_not_found`,
    as of a discriminated union.
    """
    if not isinstance(value, dict):
        return value
    kinds = registry.names("source")
    if "kind" not in value:
        raise PydanticCustomError(
            "union_tag_not_found", "a source needs a kind: one of {kinds}.", {"kinds": kinds}
        )
    kind = value["kind"]
    if kind not in kinds:
        raise PydanticCustomError(
            "union_tag_invalid",
            "unknown source '{kind}': {hint}",
            {"kind": str(kind), "hint": did_you_mean(str(kind), kinds)},
        )
    return registry.get("source", kind).model_validate(value)


# A field of this type takes any registered source: its own class validates and serializes it.
AnySource = Annotated[SerializeAsAny[Source], BeforeValidator(_of_its_kind)]


class _Sources(Mapping[str, type[Source]]):
    """Every registered source's class by its kind, as `memvec.registry` knows them now."""

    def __getitem__(self, kind: str) -> type[Source]:
        if kind not in self:
            raise KeyError(kind)
        source: type[Source] = registry.get("source", kind)
        return source

    def __contains__(self, kind: object) -> bool:
        return kind in registry.names("source")

    def __iter__(self) -> Iterator[str]:
        return iter(registry.names("source"))

    def __len__(self) -> int:
        return len(registry.names("source"))


SOURCES = _Sources()
