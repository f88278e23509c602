r"""`memvec cram`: a text becomes a file of \[mem] vectors, certified to decode exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli import options
from memvec.cli.common import (
    ModelChoice,
    account,
    assigned,
    check_target,
    preset_of,
    recipe_of,
    renamed_seats,
)
from memvec.cli.expected import counted
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, check_minimum
from memvec.writing import path_of, pretty_json

if TYPE_CHECKING:
    from memvec.journal import Journal
    from memvec.model.lm import FrozenLM
    from memvec.passages.documents import Document
    from memvec.vectors import MemVectors
    from memvec.workers import Workers

FOR_USE = ("usable", "usable-quick", "usable-long")  # presets

EXAMPLES = options.examples(
    "memvec cram letter.txt", "cat notes.md | memvec cram - --vectors 2 --json -o notes.mem"
)

Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Default: FILE's stem + .mem.safetensors.")
]
OneStep = Annotated[
    bool,
    typer.Option(
        "--one-step", help="Two vectors per passage; one forward pass decodes all of its tokens."
    ),
]
SharedM = Annotated[
    bool,
    typer.Option(
        "--shared-m",
        help="With --one-step: all passages share one of their two vectors and are crammed "
        "together, so they depend on each other, and an interrupted run starts again.",
    ),
]
Layer = Annotated[int | None, typer.Option("--layer", help=options.recipe_help("layer"))]
Margin = Annotated[float | None, typer.Option(help=options.recipe_help("margin"))]
Corrections = Annotated[int | None, typer.Option(help=options.recipe_help("corrections"))]
Start = Annotated[str | None, typer.Option(help=options.recipe_help("start"))]
StartRule = Annotated[str | None, typer.Option(help=options.recipe_help("start_rule"))]
Trigger = Annotated[str | None, typer.Option(help=options.recipe_help("trigger"))]
Usable = Annotated[
    bool,
    typer.Option(
        "--usable",
        help="Vectors that also stand for the text as context, for 'memvec use'; the preset "
        "'usable'.",
    ),
]
UseWeight = Annotated[
    float | None,
    typer.Option(
        "--use-weight", help="Weight of use as context beside exactness; implies --usable."
    ),
]
Queries = Annotated[str | None, typer.Option(help=options.recipe_help("queries"))]
Seed = Annotated[int | None, typer.Option(help=options.recipe_help("seed"))]
KeepText = Annotated[bool, typer.Option(help="Store the text itself in the file too.")]


def cram(
    file: options.TextFile,
    model: options.Model = "pocket",
    output: Output = None,
    vectors: options.Vectors = 1,
    tokens: options.Tokens = None,
    one_step: OneStep = False,
    shared_m: SharedM = False,
    space: options.Space = None,
    layer: Layer = None,
    preset: options.Preset = "default",
    margin: Margin = None,
    steps: options.Steps = None,
    corrections: Corrections = None,
    start: Start = None,
    encoder: options.Encoder = None,
    start_rule: StartRule = None,
    usable: Usable = False,
    use_weight: UseWeight = None,
    trigger: Trigger = None,
    queries: Queries = None,
    seed: Seed = None,
    set_: options.Set = None,
    storage: options.StorageFormat = options.Storage.float32,
    batch_size: options.BatchSize = None,
    seats: options.Seats = None,
    workers: options.WorkerCount = 0,
    on: options.Cluster = None,
    halve: options.Halve = True,
    keep_text: KeepText = False,
    encoding: options.Encoding = "utf-8",
    max_bytes: options.MaxBytes = 4_000_000,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    load: options.Load = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    r"""Cram a text into \[mem] vectors, certify that it decodes exactly, and save them."""
    fields: dict[str, Any] = {"margin": margin, "steps": steps, "corrections": corrections}
    fields |= {"seed": seed, "start": start, "start_rule": start_rule, "space": space}
    fields |= {"layer": layer, "term_weight": use_weight, "trigger": trigger, "queries": queries}
    request = _Request(
        file=file,
        output=output,
        choice=ModelChoice.of(model, revision, device, dtype, load, encoder),
        recipe=_recipe(_preset(preset, usable, fields), set_, fields),
        vectors=vectors,
        tokens=tokens,
        layout=_layout(one_step, shared_m, vectors),
        storage=storage.value,
        batch_size=renamed_seats(batch_size, seats),
        workers=workers,
        address=on,
        halve=halve,
        keep_text=keep_text,
        reading={"encoding": encoding, "largest": max_bytes},
        force=force,
    )
    _report(*_run(request), json)


@dataclass(frozen=True)
class _Request:
    """Everything that one run of `memvec cram` was asked for."""

    file: str
    output: Path | None
    choice: ModelChoice
    recipe: Recipe
    vectors: int
    tokens: int | None
    layout: str
    storage: str
    batch_size: int | None
    workers: int
    address: str | None
    halve: bool
    keep_text: bool
    reading: dict[str, Any]  # how the text is read: its encoding, and the most bytes
    force: bool

    @property
    def target(self) -> Path:
        """The file to write: beside the text, or in the current folder for standard input."""
        if self.output is not None:
            return self.output
        if self.file == "-":
            return Path("stdin.mem.safetensors")
        return Path(self.file).with_name(f"{Path(self.file).stem}.mem.safetensors")

    def check(self) -> None:
        """Raise MemvecError for what can be seen to be wrong before the model loads."""
        from memvec.passages.documents import peek

        check_minimum(1, vectors=self.vectors, tokens=self.tokens, batch_size=self.batch_size)
        check_minimum(0, workers=self.workers)
        check_minimum(1, max_bytes=self.reading["largest"])
        if self.layout == "one-step-shared" and (self.workers or self.address):
            raise MemvecError(
                "--shared-m crams all passages together: leave out --workers and --on."
            )
        peek(self.file, self.reading["largest"])
        if self.file != "-" and self.target.exists() and self.target.samefile(self.file):
            raise MemvecError(f"{self.target} is the text itself: name another file with -o.")
        check_target(self.target, self.force)

    def check_start(self, lm: FrozenLM) -> None:
        """Raise MemvecError for a seed or for the file of an encoder that changes no vector."""
        from memvec.cramming.starts import encoder_of
        from memvec.lab.seeds import refuse_idle_seed

        advice = "so leave --seed out, or add --start noise."
        refuse_idle_seed(lm.read_as(self.layout), self.recipe, advice)
        file, encoder = self.choice.encoder, encoder_of(lm, self.recipe)
        if file is None:
            return
        if self.recipe.start not in ("auto", "encoder"):
            raise MemvecError(
                f"{file} is where vectors would begin, and so is --start {self.recipe.start}: "
                "leave out one of them."
            )
        if encoder is not None and encoder.file == path_of(file):
            return
        if self.recipe.term == "use":
            raise MemvecError(
                f"{file} is no start of vectors that are to be used: leave it out, or train one "
                "with memvec encoder train --usable."
            )
        raise MemvecError(f"{file} is a start of vectors that are to be used: add --usable.")


def _preset(preset: str, usable: bool, fields: dict[str, Any]) -> str:
    """The preset, or the one that vectors for use or in another space than inputs have."""
    if not usable and fields["term_weight"] is None:
        if fields["trigger"] or fields["queries"]:
            raise MemvecError("--trigger and --queries are for usable vectors: give --usable, too.")
        return preset_of(preset, fields["space"])
    if preset not in ("default", *FOR_USE):
        raise MemvecError(f"--usable has a recipe of its own: leave out --preset {preset}.")
    check_minimum(0.0, use_weight=fields["term_weight"])
    return "usable" if preset == "default" else preset


def _recipe(preset: str, assignments: list[str] | None, fields: dict[str, Any]) -> Recipe:
    """The recipe; one of vectors for use stays one. Raises MemvecError as `recipe_of`."""
    term = assigned(assignments).get("term", "use")
    if preset in FOR_USE and term != "use":
        raise MemvecError(f"--set term={term} leaves nothing of --usable: leave out one of them.")
    return recipe_of(preset, assignments, **fields)


def _layout(one_step: bool, shared_m: bool, vectors: int) -> str:
    if one_step and vectors not in (1, 2):
        raise MemvecError(f"--one-step takes two vectors a passage: leave out --vectors {vectors}.")
    if shared_m and not one_step:
        raise MemvecError("--shared-m is for --one-step: give both.")
    if not one_step:
        return "prefix"
    return "one-step-shared" if shared_m else "one-step"


def _run(request: _Request) -> tuple[MemVectors, Path, dict[str, int]]:
    """Cram and save: the vectors, their file, and the bytes that text and vectors take.

    The journal of finished passages stays until they are saved.
    """
    request.check()
    from memvec.cli import display
    from memvec.journal import Journal
    from memvec.passages.documents import read_document
    from memvec.resume import settings_of

    lm = request.choice.load()
    request.check_start(lm)
    document = read_document(lm, request.file, **request.reading)
    partial = request.target.with_name(request.target.name + ".partial")
    settings = settings_of(
        lm,
        request.recipe,
        vectors=request.vectors,
        storage=request.storage,
        layout=request.layout,
    )
    journal = Journal(partial, settings)
    if len(journal):
        display.say(f"Going on: {counted(len(journal), 'passage')} finished by an earlier run.")
    try:
        mem = _cram(request, lm, document, journal)
        saved = mem.save(request.target, force=request.force)
    except BaseException as error:
        finished = len(journal)
        journal.close(delete=finished == 0)
        if isinstance(error, KeyboardInterrupt):
            sentence = (
                f"{counted(finished, 'finished passage')} kept in {journal.path}; the same command "
                "goes on from there."
            )
            display.say(f"Interrupted. {sentence if finished else 'No passage was finished.'}")
            raise typer.Exit(130) from None
        raise
    journal.close(delete=True)
    return mem, saved, account(mem, document.data(lm))


def _cram(request: _Request, lm: FrozenLM, document: Document, journal: Journal) -> MemVectors:
    from memvec import codec
    from memvec.cli.progress import cram_progress

    title = f"{request.file} with {lm.name}"
    with _workers(request, lm) as pool, cram_progress(title, pool.count if pool else 0) as show:
        return codec.cram(
            lm,
            [document],
            vectors=request.vectors,
            tokens=request.tokens,
            recipe=request.recipe,
            batch_size=request.batch_size,
            storage=request.storage,
            layout=request.layout,
            halve=request.halve,
            keep_text=request.keep_text,
            journal=journal,
            workers=pool,
            on_status=show,
        )


@contextlib.contextmanager
def _workers(request: _Request, lm: FrozenLM) -> Iterator[Workers | None]:
    """Ray workers with the same model in the same dtype, if they were asked for."""
    if not (request.workers or request.address):
        yield None
        return
    from memvec.workers import Loading, Workers

    choice = request.choice
    loading = Loading(
        str(choice.name),
        choice.revision,
        lm.description()["dtype"],
        choice.encoder,
        choice.options,
    )
    workers = Workers(
        loading, workers=request.workers, address=request.address, device=choice.device
    )
    try:
        yield workers
    finally:
        workers.close()


def _report(mem: MemVectors, saved: Path, byte_counts: dict[str, int], json: bool) -> None:
    """Print the result; exit code 3 and a sentence for each passage that is not exact."""
    from memvec.cli import display

    if json:
        typer.echo(pretty_json({"file": str(saved), **mem.summary(), "bytes": byte_counts}))
    else:
        display.summary(mem, saved, byte_counts)
    if not mem.exact:
        for sentence in display.failures(mem):
            display.say(sentence)
        raise typer.Exit(3)
