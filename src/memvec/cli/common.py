"""What several verbs do with their options: check them, load a model, open a file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.recipe_effect import check_effect
from memvec.registry import BUILT_IN

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors

SWITCHES = ("checkpointing", "offload", "graphs")
LOADING_OPTIONS = ("device_map=auto", "quantize=8bit", "quantize=4bit", *SWITCHES)


@contextlib.contextmanager
def reporting_interrupt(state: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, print the sentence that `state` gives (what is saved), and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        from memvec.cli import display

        display.say(f"Interrupted. {state()}")
        raise typer.Exit(130) from None


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command was asked to use: arguments of `memvec.load_lm`.

    `dtype` None stands for the one that a file was crammed in; `options` come from --load.
    """

    name: str | None
    revision: str | None
    device: str
    dtype: str | None
    options: dict[str, Any]
    encoder: Path | None = None

    @classmethod
    def of(
        cls,
        name: str | None,
        revision: str | None,
        device: str,
        dtype: str | None,
        load: list[str] | None,
        encoder: Path | None = None,
    ) -> ModelChoice:
        """From the command line's options. Raises MemvecError for a bad --load."""
        return cls(name, revision, device, dtype, loading_options(load), encoder)

    def load(self) -> FrozenLM:
        """Load the model and print one line about it on stderr. Raises MemvecError as load_lm."""
        from memvec.cli import display
        from memvec.loading import load_lm

        lm = load_lm(
            str(self.name),
            revision=self.revision,
            device=self.device,
            dtype=self.dtype or "auto",
            encoder=self.encoder,
            **self.options,
        )
        display.model(lm.description())
        return lm


def loading_options(
    items: list[str] | None, known: Sequence[str] = LOADING_OPTIONS
) -> dict[str, Any]:
    """Keyword arguments of `load_lm` from --load; an error names those `known`.

    Raises MemvecError for an unknown one.
    """
    options: dict[str, Any] = {}
    for item in items or []:
        name, _, value = item.partition("=")
        if name in SWITCHES:
            if value not in ("", "true", "false"):
                raise MemvecError(f"--load {name} is on, or {name}=false, not '{value}'.")
            options[name] = value != "false"
        elif name in ("device_map", "quantize") and value:
            options[name] = value
        else:
            raise MemvecError(f"--load takes {', '.join(known)}, not '{item}'.")
    return options


def study_loading(items: list[str] | None) -> dict[str, Any]:
    """As `loading_options`, for the models of a study. Raises MemvecError for `quantize`, too."""
    given = loading_options(items, [way for way in LOADING_OPTIONS if "quantize" not in way])
    if "quantize" in given:
        raise MemvecError(
            "the weights of a study's model belong to its spec: write quantize = "
            f'"{given["quantize"]}" there, under [[models]].'
        )
    return given


def open_file(file: str, choice: ModelChoice) -> tuple[MemVectors, FrozenLM]:
    """A file of vectors, and its model in the dtype and quantisation that it was certified in.

    What `choice` leaves open (name, revision, dtype, quantisation) comes from the file. Raises
    MemvecError for a file or a model that cannot be loaded.
    """
    from memvec.vectors import MemVectors

    mem = MemVectors.load(file)
    crammed_with = mem.header.model
    if choice.name is None and choice.revision is None:
        choice = replace(choice, revision=crammed_with.get("revision"))
    options = dict(choice.options)
    if crammed_with.get("quantize"):  # decoding needs the same weights
        options.setdefault("quantize", crammed_with["quantize"])
    choice = replace(
        choice,
        name=choice.name or str(crammed_with.get("name")),
        dtype=choice.dtype or str(crammed_with.get("dtype", "auto")),
        options=options,
    )
    return mem, choice.load()


def preset_of(preset: str, space: str | None) -> str:
    """The preset, or instead of the default one that of the space, if there is one of its name."""
    return space if preset == "default" and space in BUILT_IN["preset"] else preset


def recipe_of(preset: str, assignments: list[str] | None, **options: Any) -> Recipe:
    """A preset changed by the options that were given (not None), then by --set NAME=VALUE.

    Raises MemvecError for an unknown preset or field, a value that the field cannot have, or a
    field that does nothing in this recipe.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    more = assigned(assignments)
    if twice := sorted(changes.keys() & more.keys()):
        raise MemvecError(f"the recipe's {twice[0]} is given by --set and by its option: keep one.")
    changes |= more
    recipe = Recipe.of(preset, **changes)
    check_effect(recipe, changes)
    return recipe


def assigned(assignments: list[str] | None) -> dict[str, str]:
    """Fields and values from --set, hyphens in a name as underscores.

    Raises MemvecError for an item without an equals sign, or a field that is given twice.
    """
    values: dict[str, str] = {}
    for item in assignments or []:
        written, equals, value = item.partition("=")
        if not equals:
            raise MemvecError(f"--set takes name=value, not '{item}'.")
        name = written.strip().replace("-", "_")
        if name in values:
            raise MemvecError(f"--set {name} is given twice: keep one.")
        values[name] = value.strip()
    return values


def renamed_seats(batch_size: int | None, seats: int | None) -> int | None:
    """The batch size, from --seats where its old name was used; then one line warns on stderr.

    Raises MemvecError if both are given.
    """
    if seats is None:
        return batch_size
    typer.echo(
        "memvec: --seats is now --batch-size; the old name goes away in the next release.", err=True
    )
    if batch_size is not None:
        raise MemvecError("--seats and --batch-size are the same option: leave out --seats.")
    return seats


def account(mem: MemVectors, text: bytes) -> dict[str, int]:
    """Bytes of the text, of the vectors with all that is listed, and of the text compressed.

    Under the start rule 'first-token' a passage's first token is listed (LEB128) and costs the
    arithmetic coder log2 V bits. A trigger is a model's, not a text's, and is not counted.
    """
    from memvec.lab.compressors import byte_account

    s = mem.summary()
    given = [p.first for p in mem.passages if p.first is not None]
    size = s["vector_bytes"] + s["edit_bytes"] + s["correction_bytes"]
    size += sum(-(-max(1, token.bit_length()) // 7) for token in given)
    alone = math.log2(int(mem.header.model.get("vocabulary", 2)))
    return byte_account(text, size, s["lm_bits"] + len(given) * alone)


def check_target(target: Path, force: bool) -> None:
    """Raise MemvecError, before hours of work, if a file cannot be written or is already there."""
    if str(target).encode("utf-8", "replace").decode() != str(target):
        raise MemvecError(  # the safetensors library could not read it again
            f"{os.fsencode(target)!r} is no name in UTF-8: name the file to write with -o."
        )
    if str(target) == "-":
        raise MemvecError("vectors cannot be written to standard output: name a file with -o.")
    if target.is_dir():
        raise MemvecError(f"{target} is a directory: name a file in it with -o.")
    if target.exists() and not target.is_file():
        raise MemvecError(f"{target} is a device or a pipe: name a file with -o.")
    if target.exists() and not force:
        raise MemvecError(f"{target} exists: use --force to overwrite it, or -o for another.")
    if not target.parent.is_dir():
        raise MemvecError(f"there is no folder {target.parent} to write {target.name} in.")
    try:
        probe = target.with_name(f".{target.name}.probe")
        probe.touch()
        probe.unlink(missing_ok=True)  # another command may look, too
    except OSError as error:
        raise MemvecError(f"{target.parent} cannot be written to: {error.strerror}.") from None


def check_seed(seed: int | None) -> None:
    """Raise MemvecError for a seed of more than 64 bits; None is none."""
    if seed is not None and abs(seed) >= 2**63:
        raise MemvecError(f"--seed must fit 64 bits; {seed} does not.")
