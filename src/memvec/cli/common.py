"""What several verbs do with their options: check them, load a model, open a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors

LOADING_OPTIONS = ("device_map=auto", "quantize=4bit", "checkpointing", "offload")


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
        display.model(lm)
        return lm


def loading_options(items: list[str] | None) -> dict[str, Any]:
    """Keyword arguments of `load_lm` from --load. Raises MemvecError for an unknown one."""
    options: dict[str, Any] = {}
    for item in items or []:
        name, _, value = item.partition("=")
        if name in ("checkpointing", "offload"):
            if value not in ("", "true", "false"):
                raise MemvecError(f"--load {name} is on, or {name}=false, not '{value}'.")
            options[name] = value != "false"
        elif name in ("device_map", "quantize") and value:
            options[name] = value
        else:
            raise MemvecError(f"--load takes {', '.join(LOADING_OPTIONS)}, not '{item}'.")
    return options


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


def recipe_of(preset: str, assignments: list[str] | None, **options: Any) -> Recipe:
    """A preset changed by the options that were given (not None), then by --set NAME=VALUE.

    Raises MemvecError for an unknown preset or field, or a value that the field cannot have.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    for item in assignments or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise MemvecError(f"--set takes name=value, not '{item}'.")
        changes[name.strip()] = value.strip()
    return Recipe.of(preset, **changes)


def renamed_seats(batch_size: int | None, seats: int | None) -> int | None:
    """The batch size, from --seats where its old name was used; then one line warns on stderr."""
    if seats is None:
        return batch_size
    typer.echo(
        "memvec: --seats is now --batch-size; the old name goes away in the next release.", err=True
    )
    if batch_size is not None:
        raise MemvecError("--seats and --batch-size are the same option: leave out --seats.")
    return seats
