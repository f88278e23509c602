"""The header of a file of [mem] vectors: all fields but the numbers, documented and validated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from memvec.model.reading import Layout
from memvec.results import PassageResult, Record
from memvec.storage import PackingName

if TYPE_CHECKING:
    from typing import Self

LONGEST = 1_000_000  # maximum tokens of a passage in a header; no model reads more

Position = Annotated[int, Field(ge=0, lt=LONGEST)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class PassageRecord(PassageResult):
    """One passage in a file: its result, the hash of its tokens, and the tokens that are given."""

    tokens: int = Field(ge=1, le=LONGEST, description="tokens of the passage")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="hash of its token ids")
    first: int | None = Field(default=None, ge=0, description="given first token, if one is given")
    corrections: list[tuple[Position, TokenId]] = Field(
        default_factory=list, description="rising positions, and the token id at each"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        places = [position for position, _ in self.corrections]
        if not self.horizon <= self.predicted <= self.tokens or abs(self.token_gain) > self.tokens:
            raise ValueError("its horizon or gain is longer than the passage")
        if places != sorted(set(places)) or (places and places[-1] >= self.tokens):
            raise ValueError("the corrections are not at rising positions of the passage")
        return self


class DocumentRecord(Record):
    """One text: its number of passages, and what restores its bytes from their tokens.

    `edits` are (start, end, new) in order: `new` replaces the characters [start, end) of the text
    that the tokenizer decodes (memvec.passages.documents).
    """

    name: str = Field(description="the text's file, 'standard input', or 'text' and its number")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="hash of the text's bytes")
    size: int = Field(ge=1, description="bytes")
    encoding: str = Field(default="utf-8", description="encoding of the text's bytes")
    edits: list[tuple[int, int, str]] = Field(default_factory=list)
    passages: int = Field(ge=1, description="number of passages, in order")
    text: str | None = Field(default=None, description="the text itself, only if asked for")


class _Identity(BaseModel):
    """The part of `Header.model` that memvec reads; the rest is information for the user."""

    name: str
    config: str
    weights: str
    probe: list[float]
    dtype: str
    quantize: str | None = None
    vocabulary: int = Field(ge=2)


class SpaceRecord(Record):
    """The space of the vectors, if they are not inputs."""

    name: str = Field(description="name in the registry, of the kind 'space'")
    numbers: int = Field(ge=1, description="numbers of a vector (W)")
    options: dict[str, Any] = Field(description="options with which the model builds the space")


class Header(Record):
    """All fields of a file but the numbers. Raises pydantic's ValidationError for wrong fields."""

    format: Literal["memvec"] = "memvec"
    version: Literal[1] = 1
    model: dict[str, Any] = Field(description="FrozenLM.description()")
    start_rule: Literal["vectors", "bos", "first-token"] = Field(description="see Recipe")
    layout: Layout = Field(
        default="prefix",
        description="how the model reads the vectors: 'prefix', in front of the passage; "
        "'one-step', two as [e, m, ..., m]; 'one-step-shared', one m for all passages",
    )
    space: SpaceRecord | None = Field(
        default=None, description="the space of the vectors; none: they are inputs"
    )
    front: Literal["none", "bos"] = Field(
        default="none", description="the token in front of the vectors of a passage"
    )
    trigger: int | None = Field(
        default=None,
        ge=0,
        description="token id that follows the vectors under the start rule 'bos'; none: the BOS",
    )
    soft_trigger: int = Field(
        default=0,
        ge=0,
        description="number of soft tokens that replace this token: rows of the tensor 'trigger'",
    )
    soft_front: int = Field(
        default=0, ge=0, description="number of soft tokens after `front`: rows of 'front'"
    )
    context_scale: float = Field(default=1.0, gt=0, description="factor of vectors as context")
    packing: PackingName | None = Field(
        default=None, description="integer format of the stored numbers; none: floating point"
    )
    recipe: dict[str, Any] = Field(description="Recipe.record(), with margins in logits")
    environment: dict[str, Any] = Field(description="versions and machine that made the file")
    documents: list[DocumentRecord] = Field(description="the texts, in order")
    passages: list[PassageRecord] = Field(description="the passages of all texts, in order")
    certificate: dict[str, Any] | None = Field(
        default=None, description="result of decoding the whole file from the stored vectors"
    )
    use: dict[str, Any] | None = Field(
        default=None,
        description="how well the vectors stand for the text (memvec.usable.certificate)",
    )

    @field_validator("model")
    @classmethod
    def _identifies(cls, model: dict[str, Any]) -> dict[str, Any]:
        _Identity.model_validate(model)
        return model

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.layout != "prefix" and (self.start_rule != "vectors" or self.space):
            raise ValueError("one-step vectors are inputs that are not followed by tokens")
        if (self.front != "none" or self.soft_front) and (self.layout != "prefix" or self.space):
            raise ValueError("tokens stand in front of inputs that a passage follows only")
        misplaced = self.start_rule != "bos" or self.trigger is not None or not self.soft_trigger
        if (self.soft_trigger or self.soft_front) and misplaced:
            raise ValueError("a crammed trigger stands where BOS or another token would")
        if sum(d.passages for d in self.documents) != len(self.passages):
            raise ValueError("the documents do not add up to the passages")
        return self
