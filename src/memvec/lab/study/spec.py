"""A study's spec: a TOML file, validated once, with one sentence for whatever is wrong.

    name = "mine"
    [[models]]
    name = "pocket"
    [[sources]]
    kind = "random-words"
    [[runs]]
    protocol = "exact"
    lengths = [64]

Every field has a description; unknown keys get a did-you-mean.
"""

from __future__ import annotations

import glob
import os
import re
import tomllib
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memvec import plugins
from memvec.big import Quantize
from memvec.errors import MemvecError, did_you_mean
from memvec.header import LONGEST
from memvec.lab.protocols.lookup import protocol_names, protocol_of
from memvec.lab.sources import SOURCES, AnySource, Source
from memvec.lab.study.wording import place_of, refusal
from memvec.loading import DTYPES
from memvec.writing import path_of

StorageName = Literal["float32", "bfloat16", "float16"]
Whole = Annotated[int, Field(strict=True)]  # not true, and not 6.0


class Strict(BaseModel):
    """No unknown keys, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelKey(NamedTuple):
    """What says which weights are read: two models of a spec differ in one of these."""

    name: str
    revision: str | None
    dtype: str
    quantize: str | None


class ModelSpec(Strict):
    """A model of the study."""

    name: str = Field(
        min_length=1,
        description="Hub id, folder, or the built-in 'pocket'; with * or ?, every folder that fits",
    )
    revision: str | None = Field(default=None, description="revision of a Hub model")
    dtype: str = Field(
        default="auto", description="auto, float32, bfloat16, float16 or bfloat16-autocast"
    )
    quantize: Quantize | None = Field(
        default=None,
        description="8bit or 4bit: linear weights in few bits; default: none are",
    )

    @property
    def key(self) -> ModelKey:
        """What tells the model from the others of the spec."""
        return ModelKey(self.name, self.revision, self.dtype, self.quantize)


class RunSpec(Strict):
    """A block of cells: models × sources × lengths × vectors × seeds under one protocol."""

    protocol: str = Field(description="what is measured: a name of the table of protocols")
    models: tuple[str, ...] = Field(default=(), description="names of models; default: all")
    sources: tuple[str, ...] = Field(default=(), description="names of sources; default: all")
    lengths: tuple[Whole, ...] = Field(
        min_length=1,
        description="tokens of a passage (per vector for 'vectors', at most for 'sentences')",
    )
    vectors: tuple[Whole, ...] = Field(default=(1,), min_length=1, description="K, [mem] vectors")
    seeds: tuple[Whole, ...] = Field(
        default=(0,), min_length=1, description="cram every passage once from each"
    )
    passages: Whole = Field(default=50, description="passages of each cell")
    recipe: dict[str, Any] = Field(
        default={},
        description="changes of the protocol's recipe; 'preset' names another recipe to change",
    )
    budget: Whole = Field(
        default=0, ge=0, description="maximum of forward-backward tokens for a passage; 0: no limit"
    )
    storage: StorageName | None = Field(
        default=None, description="dtype of this run's stored vectors; default: the spec's"
    )
    options: dict[str, Any] = Field(
        default={}, description="options of the protocol; they may stand in the run itself"
    )


class Spec(Strict):
    """A whole study."""

    name: str = Field(description="name of the study and of its default folder")
    about: str = Field(default="", description="what it is for")
    batch_size: Whole = Field(default=8, ge=1, description="passages crammed at once on a device")
    storage: StorageName = Field(default="float32", description="dtype of stored vectors")
    fixed_shapes: bool = Field(
        default=True,
        strict=True,
        description="keep batch shapes fixed, so that a passage's worker and slot change at most "
        "the rounding",
    )
    device: str = Field(default="auto", description="auto, cpu or cuda:0")
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    sources: tuple[AnySource, ...] = Field(min_length=1)
    runs: tuple[RunSpec, ...] = Field(min_length=1)


def read_spec(path: str | os.PathLike[str], model: str | None = None) -> Spec:
    """Read and validate a spec. `model` replaces every model of it.

    Raises MemvecError, one sentence, for a file that is missing or not UTF-8, and as `parse_spec`.
    """
    path = path_of(path)
    if not path.is_file():
        raise MemvecError(f"there is no spec {path}.")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise MemvecError(f"{path} is not UTF-8 text: a spec is a TOML file.") from None
    return parse_spec(text, str(path), model)


def parse_spec(text: str, where: str, model: str | None = None) -> Spec:
    """Validate a spec's text; `where` names it in errors.

    Raises MemvecError, one sentence, for a text that is no TOML, or what no spec may say.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, and [[[[...
        raise MemvecError(f"{where} is not TOML: {error}.") from None
    _name_sources(data)
    _find_folders(data, where)
    _take_options(data, where)
    if "seats" in data and "batch_size" not in data:
        data["batch_size"] = data.pop("seats")
        warnings.warn(
            f"{where}: 'seats' is called 'batch_size' now, and will not be read any more in the "
            "next release.",
            FutureWarning,
            stacklevel=3,
        )
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise MemvecError(f"{where}: {_sentence(error, data)}") from None
    if model is not None:
        spec = with_model(spec, model)
    _check(spec, where)
    return spec


def with_model(spec: Spec, name: str) -> Spec:
    """The same study for another model, loaded as the spec's models are.

    The ways in which different models are loaded are kept if they agree.
    """
    runs, seen = [], set()
    for run in spec.runs:
        one = run.model_copy(update={"models": ()})
        key = one.model_dump_json()
        if key not in seen:  # runs that differed by their model only
            seen.add(key)
            runs.append(one)
    ways = list(dict.fromkeys((model.dtype, model.quantize) for model in spec.models))
    if len(ways) > 1 and len({model.name for model in spec.models}) > 1:
        ways = [("auto", None)]
    models = tuple(ModelSpec(name=name, dtype=dtype, quantize=bits) for dtype, bits in ways)
    return spec.model_copy(update={"models": models, "runs": tuple(runs)})


def _name_sources(data: dict[str, Any]) -> None:
    sources = data.get("sources")
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and not source.get("name") and "kind" in source:
            source["name"] = str(source["kind"])


def _find_folders(data: dict[str, Any], where: str) -> None:
    """Put the folders of models that a pattern fits in its place, in the order of their names.

    Raises MemvecError for a pattern that fits none.
    """
    models = data.get("models")
    expanded: list[Any] = []
    for model in models if isinstance(models, list) else []:
        name = model.get("name") if isinstance(model, dict) else None
        if not isinstance(name, str) or not set("*?") & set(name):
            expanded.append(model)
            continue
        pattern = str(path_of(name) / "config.json")
        # Path.glob takes no absolute pattern.
        folders = sorted(str(Path(file).parent) for file in glob.glob(pattern))  # noqa: PTH207
        if not folders:
            raise MemvecError(f"{where}: no folder with a model fits '{name}'.")
        expanded += [{**model, "name": folder} for folder in folders]
    if expanded:
        data["models"] = expanded


def _take_options(data: dict[str, Any], where: str) -> None:
    """Move the options of each run's protocol, written beside `protocol`, into `options`.

    Raises MemvecError for an unknown protocol: its options cannot be known.
    """
    runs = data.get("runs")
    for i, run in enumerate(runs if isinstance(runs, list) else [], 1):
        name = run.get("protocol") if isinstance(run, dict) else None
        if not isinstance(name, str):
            continue  # pydantic reports it
        if name not in protocol_names():
            hint = plugins.known(name, protocol_names())
            raise MemvecError(f"{where}: unknown protocol '{name}' in runs [{i}]: {hint}")
        option_names = protocol_of(name).Options.model_fields
        beside = {key: run.pop(key) for key in list(run) if key in option_names}
        if beside and isinstance(run.get("options", {}), dict):  # else pydantic reports it
            run["options"] = {**run.get("options", {}), **beside}


_KINDS: dict[str, type[BaseModel]] = {"models": ModelSpec, "runs": RunSpec}


def _sentence(error: ValidationError, data: dict[str, Any]) -> str:
    """The first of pydantic's errors as a sentence; first an unknown key, maybe one misspelt."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    loc = [part for part in first["loc"] if part not in SOURCES]
    where = place_of(loc)
    if first["type"] == "extra_forbidden":
        owner: type[BaseModel] = Spec
        if loc[0] == "sources":
            index = int(loc[1])
            owner = SOURCES.get(data["sources"][index].get("kind", ""), Source)
        elif len(loc) > 1:
            owner = _KINDS.get(str(loc[0]), Spec)
        belongs = [n for n in protocol_names() if loc[-1] in protocol_of(n).Options.model_fields]
        if owner is RunSpec and belongs:
            return f"{place_of(loc[:-1])} has no option '{loc[-1]}': it belongs to '{belongs[0]}'."
        hint = did_you_mean(str(loc[-1]), owner.model_fields)
        return f"unknown key '{loc[-1]}' in {place_of(loc[:-1])}: {hint}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = data["sources"][int(loc[1])].get("kind")
        if kind is None:
            return f"{where} needs a kind: one of {', '.join(SOURCES)}."
        return f"unknown kind '{kind}' in {where}: {plugins.known(str(kind), SOURCES)}"
    if first["type"] == "missing" and isinstance(loc[-1], str):
        return f"{place_of(loc[:-1])} needs '{loc[-1]}'."
    if first["type"] == "tuple_type" and isinstance(first["input"], dict):
        return f"{where} is a list of tables: write [[{where}]], with two brackets."
    if first["type"] == "missing":
        where = place_of(loc[:-1])
    return f"{where} {refusal(first, loc)}."


def _check(spec: Spec, where: str) -> None:
    if spec.name.strip() in ("", ".", "..") or set(spec.name) & set("/\\\0"):
        raise MemvecError(
            f"{where}: the name '{spec.name}' is that of a folder: give it some letters, and no "
            "slash."
        )
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", spec.device) is None:
        raise MemvecError(f"{where}: unknown device '{spec.device}': use auto, cpu or cuda:0.")
    for model in spec.models:
        if model.dtype not in ("auto", *DTYPES):
            hint = did_you_mean(model.dtype, ("auto", *DTYPES))
            raise MemvecError(f"{where}: unknown dtype '{model.dtype}' of {model.name}: {hint}")
    models = [m.name for m in spec.models]
    sources = [s.name for s in spec.sources]
    keys = [m.key._replace(revision=m.revision or "main") for m in spec.models]
    if alike := [key.name for key in keys if keys.count(key) > 1]:
        raise MemvecError(
            f"{where}: the model '{alike[0]}' is there twice: remove one, or load it in another "
            "way (revision, by default 'main', dtype, quantize)."
        )
    if alike := [name for name in sources if sources.count(name) > 1]:
        raise MemvecError(f"{where}: two sources are called '{alike[0]}': give one a name.")
    for i, run in enumerate(spec.runs, 1):
        place = f"{where}: run {i} ({run.protocol})"
        for kind, wanted, known in (
            ("source", run.sources, sources),
            ("model", run.models, models),
        ):
            for name in wanted:
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise MemvecError(f"{place} names a missing {kind} '{name}': {hint}")
        _check_run(run, place)


def _check_run(run: RunSpec, place: str) -> None:
    counts = (("passages", (run.passages,)), ("lengths", run.lengths), ("vectors", run.vectors))
    for field, values in counts:
        if min(values) < 1:
            raise MemvecError(f"{place}: {field} must be at least 1, not {min(values)}.")
        if max(values) > LONGEST:
            raise MemvecError(f"{place}: {field} must be at most {LONGEST}, not {max(values)}.")
    for name, own in (("seed", "seeds"), ("budget", "a budget" if run.budget else "")):
        if own and name in run.recipe:
            raise MemvecError(
                f"{place}: the recipe's {name} does nothing where the run has {own}: leave it out."
            )
    if any(abs(seed) >= 2**63 for seed in run.seeds):
        raise MemvecError(f"{place}: seeds must fit 64 bits.")
    if run.recipe.get("corrections"):
        raise MemvecError(
            f"{place}: a study measures what the vectors hold, so corrections must be 0."
        )
    if problem := protocol_of(run.protocol).problem(run):
        raise MemvecError(f"{place} {problem}.")
    try:
        options_of(run)
    except ValidationError as error:
        first = error.errors()[0]
        option = place_of(first["loc"])
        if first["type"] == "missing":
            raise MemvecError(f"{place} needs the option '{option}'.") from None
        if first["type"] == "extra_forbidden":
            names = protocol_of(run.protocol).Options.model_fields
            hint = did_you_mean(option, names) if names else "leave it out."
            raise MemvecError(f"{place} has no option '{option}': {hint}") from None
        raise MemvecError(f"{place}: option {option} {refusal(first, first['loc'])}.") from None


def options_of(run: RunSpec) -> dict[str, Any]:
    """The options of a run's protocol, with defaults, as JSON has them.

    Raises pydantic's ValidationError.
    """
    options: type[BaseModel] = protocol_of(run.protocol).Options
    return options.model_validate(run.options).model_dump(mode="json")
