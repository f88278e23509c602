"""The command `memvec`: verbs, options, tables and exit codes.

Exit codes: 0 done and exact; 2 something a person must change (one sentence on stderr); 3 not
exact; 130 interrupted. Nothing heavy is imported before a verb runs, so `--help` is instant.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec import __version__
from memvec.cli.encoder import app as encoders
from memvec.cli.study import app as study
from memvec.cramming.recipe import PRESETS, Recipe
from memvec.errors import MemvecError, SlowPathWarning, UntestedVersionWarning

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors

app = typer.Typer(
    name="memvec",
    help="Cram text into a few input vectors of a frozen language model, and get it back exactly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(study, name="study")
app.add_typer(encoders, name="encoder")


class Storage(StrEnum):
    """How vectors can be stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


def _field(name: str) -> str:
    return str(Recipe.__dataclass_fields__[name].metadata["help"])


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, local folder, or the built-in 'pocket'.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a Hub model.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")]
DtypeOption = Annotated[
    str, typer.Option(help="Dtype of the model: auto, float32, bfloat16, float16.")
]
LoadOption = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="For big models: device_map=auto, quantize=8bit or 4bit, checkpointing, offload.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
ForeignOption = Annotated[
    bool, typer.Option("--force", help="Try vectors that were made for other weights.")
]
FileArgument = Annotated[str, typer.Argument(help=r"A file of \[mem] vectors.")]


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"memvec {__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "memvec cram letter.txt", "cat notes.md | memvec cram - --vectors 2 --json -o notes.mem"
    )
)
def cram(
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    model: ModelOption = "pocket",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: FILE's name + .mem.safetensors.")
    ] = None,
    vectors: Annotated[int, typer.Option(help=r"\[mem] vectors per passage (K).")] = 1,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per passage; default: as many as fit by information.")
    ] = None,
    one_step: Annotated[
        bool,
        typer.Option(
            "--one-step", help="Two vectors a passage; one forward pass decodes all of its tokens."
        ),
    ] = False,
    shared_m: Annotated[
        bool,
        typer.Option(
            "--shared-m",
            help="With --one-step: all passages share one of their two vectors and are crammed "
            "together, so they depend on each other, and an interrupted run starts again.",
        ),
    ] = False,
    preset: Annotated[str, typer.Option(help=f"Recipe: {', '.join(PRESETS)}.")] = "default",
    margin: Annotated[float | None, typer.Option(help=_field("margin"))] = None,
    steps: Annotated[int | None, typer.Option(help=_field("steps"))] = None,
    corrections: Annotated[int | None, typer.Option(help=_field("corrections"))] = None,
    start: Annotated[str | None, typer.Option(help=_field("start"))] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Start from an encoder of memvec encoder train.")
    ] = None,
    start_rule: Annotated[str | None, typer.Option(help=_field("start_rule"))] = None,
    seed: Annotated[int | None, typer.Option(help=_field("seed"))] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the recipe, e.g. --set temperature=0.5."),
    ] = None,
    storage: Annotated[
        Storage, typer.Option(help="How vectors are stored; integers have one scale per vector.")
    ] = Storage.float32,
    batch_size: Annotated[
        int | None, typer.Option(help="Passages crammed at once; default: fitted.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Cram with this many Ray workers (memvec[ray]), one per device.")
    ] = 0,
    on: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster: one worker per device of it.")
    ] = None,
    keep_text: Annotated[bool, typer.Option(help="Put the text itself in the file too.")] = False,
    encoding: Annotated[str, typer.Option(help="Encoding of the text.")] = "utf-8",
    max_bytes: Annotated[int, typer.Option(help="Largest text taken.")] = 4_000_000,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    load: LoadOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    r"""Cram a text into \[mem] vectors, certify that it decodes exactly, and save them."""
    recipe = _recipe(
        preset,
        set_,
        margin=margin,
        steps=steps,
        corrections=corrections,
        start=start,
        start_rule=start_rule,
        seed=seed,
    )
    _check_sizes(vectors, tokens, batch_size)
    if one_step and vectors not in (1, 2):
        raise MemvecError(f"--one-step takes two vectors a passage: leave out --vectors {vectors}.")
    if shared_m and not one_step:
        raise MemvecError("--shared-m is for --one-step: give both.")
    layout = ("one-step-shared" if shared_m else "one-step") if one_step else "prefix"
    if workers < 0:
        raise MemvecError(f"--workers must be at least 0, not {workers}.")
    if shared_m and (workers or on):
        raise MemvecError("--shared-m crams all passages together: leave out --workers and --on.")

    from memvec.passages.documents import peek, read_document

    peek(file)  # before the model loads: a wrong name should not cost seconds
    target = output or Path(f"{'stdin' if file == '-' else Path(file).stem}.mem.safetensors")
    if output is None and file != "-":
        target = Path(file).with_name(target.name)
    _check_target(target, force)

    from memvec import codec, display
    from memvec.journal import Journal

    lm = _load(model, revision, device, dtype, load, encoder)
    document = read_document(lm, file, encoding=encoding, largest=max_bytes)
    settings = {
        "model": lm.description(),
        "recipe": recipe.record(),
        "vectors": vectors,
        "layout": layout,
        "storage": storage.value,
        "version": __version__,
    }
    journal = Journal(target.with_name(target.name + ".partial"), settings)
    if len(journal):
        display.say(f"Going on: {len(journal)} passages of an earlier run are finished.")
    crew = None
    try:
        if workers or on:
            from memvec.workers import Loading, Workers

            kept = lm.description()["dtype"]
            loading = Loading(model, revision, kept, encoder, _loading_options(load))
            crew = Workers(loading, workers=workers, address=on, device=device)
        with display.progress(f"{file} with {lm.name}") as show:
            mem = codec.cram(
                lm,
                [document],
                vectors=vectors,
                tokens=tokens,
                recipe=recipe,
                batch_size=batch_size,
                storage=storage.value,
                layout=layout,
                keep_text=keep_text,
                journal=journal,
                workers=crew,
                on_status=show,
            )
        saved = mem.save(target, force=force)
    except BaseException as error:
        finished = len(journal)
        journal.close(delete=finished == 0)
        if isinstance(error, KeyboardInterrupt):
            display.say(
                f"Interrupted. {finished} finished passages are kept in {journal.path}; "
                "the same command goes on from there."
            )
        raise
    finally:
        if crew is not None:
            crew.close()
    journal.close(delete=mem.exact)
    account = codec.account(mem, document.data(lm))
    if json:
        typer.echo(display.to_json({"file": str(saved), **mem.summary(), "bytes": account}))
    else:
        display.summary(mem, saved, account)
    _exit_unless_exact(mem)


@app.command(epilog=_examples("memvec plan book.txt", "memvec plan book.txt --vectors 4 --json"))
def plan(
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    model: ModelOption = "pocket",
    vectors: Annotated[int, typer.Option(help=r"\[mem] vectors per passage (K).")] = 1,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per passage; default: as many as fit by information.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Passages to cram, spread over the text.")] = 32,
    preset: Annotated[str, typer.Option(help=f"Recipe: {', '.join(PRESETS)}.")] = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the recipe, e.g. --set steps=500."),
    ] = None,
    storage: Annotated[Storage, typer.Option(help="How vectors would be stored.")] = (
        Storage.float32
    ),
    batch_size: Annotated[
        int | None, typer.Option(help="Passages crammed at once; default: fitted.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the places that are looked at.")] = 0,
    encoding: Annotated[str, typer.Option(help="Encoding of the text.")] = "utf-8",
    max_bytes: Annotated[int, typer.Option(help="Largest text taken.")] = 4_000_000,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    load: LoadOption = None,
    json: JsonOption = False,
) -> None:
    """Say how many vectors, bytes and minutes a text will take, by cramming a sample of it."""
    recipe = _recipe(preset, set_)
    _check_sizes(vectors, tokens, batch_size)

    from memvec import display
    from memvec.passages.documents import peek, read_document
    from memvec.plan import plan as plan_of

    peek(file)
    lm = _load(model, revision, device, dtype, load)
    document = read_document(lm, file, encoding=encoding, largest=max_bytes)
    with display.progress(f"a sample of {file} with {lm.name}") as show:
        found = plan_of(
            lm,
            document,
            vectors=vectors,
            tokens=tokens,
            recipe=recipe,
            batch_size=batch_size,
            storage=storage.value,
            sample=sample,
            seed=seed,
            on_status=show,
        )
    if json:
        typer.echo(display.to_json({"file": file, "model": lm.name, **found.record()}))
    else:
        display.planned(found, file, storage.value)


@app.command(epilog=_examples("memvec decode letter.mem", "memvec decode letter.mem > letter.txt"))
def decode(
    file: FileArgument,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the model named in the file.")
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str | None, typer.Option(help="Default: as crammed.")] = None,
    load: LoadOption = None,
    force: ForeignOption = False,
) -> None:
    """Write the exact bytes that were crammed to standard output, or nothing and an error."""
    mem, lm = _open(file, model, revision, device, dtype, load)
    for data in mem.documents(lm, force=force):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@app.command(
    epilog=_examples("memvec verify letter.mem", "memvec verify letter.mem --dtype bfloat16")
)
def verify(
    file: FileArgument,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the model named in the file.")
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[str | None, typer.Option(help="Default: as crammed.")] = None,
    load: LoadOption = None,
    force: ForeignOption = False,
    json: JsonOption = False,
) -> None:
    """Reload, decode freely, compare every passage with its hash. Exit 0 only if all are exact."""
    from memvec import codec, display

    mem, lm = _open(file, model, revision, device, dtype, load)
    decoded = mem.decode_passages(lm, force=force)
    certificate, exact = codec.certificate_of(mem, lm, decoded)
    if certificate["exact"]:
        mem.restored(lm, decoded)  # the bytes too, not only the tokens
    if json:
        typer.echo(display.to_json({**certificate, "each": exact}))
    else:
        display.certificate(mem, certificate, exact)
    if not certificate["exact"]:
        raise typer.Exit(3)


@app.command(epilog=_examples("memvec inspect letter.mem", "memvec inspect letter.mem --json"))
def inspect(file: FileArgument, json: JsonOption = False) -> None:
    """Show what is in a file: model, passages, tokens per vector, bits, margins, certificate."""
    from memvec import display
    from memvec.vectors import MemVectors

    mem = MemVectors.load(file)
    if json:
        found = {**mem.summary(), **mem.header.model_dump(mode="json")}
        typer.echo(display.to_json(found))
    else:
        display.inspect(mem, file)


@app.command(
    epilog=_examples(
        "memvec export letter.mem --to transformers",
        "memvec export letter.mem --to vllm --dtype bfloat16 -o letter.vllm",
    )
)
def export(
    file: FileArgument,
    to: Annotated[str, typer.Option("--to", help="transformers, vllm, sglang, peft or npy.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder; default: FILE's name + .TO.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the model named in the file.")
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype the target runs the model in; default: as crammed.")
    ] = None,
    load: LoadOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write the vectors for other software, certified in the type and layout that it reads."""
    from memvec import display
    from memvec import export as exporting
    from memvec.errors import did_you_mean

    if to not in exporting.TARGETS:
        raise MemvecError(f"unknown target '{to}': {did_you_mean(to, exporting.TARGETS)}")
    target = exporting.TARGETS[to]
    stem = Path(file).name.removesuffix(".safetensors").removesuffix(".mem")
    folder = output or Path(file).with_name(f"{stem}.{to}")
    mem, lm = _open(file, model, revision, device, dtype or target.dtype, load)
    manifest = exporting.export(mem, lm, target, folder, force=force)
    if json:
        typer.echo(display.to_json({"folder": str(folder), **manifest}))
    else:
        display.say(
            f"{folder}: {len(manifest['passages'])} passages for {target.says}, exact in "
            f"{manifest['dtype']}."
        )


@app.command(epilog=_examples("memvec doctor", "memvec doctor --model EleutherAI/pythia-160m"))
def doctor(
    model: ModelOption = "pocket",
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    load: LoadOption = None,
    json: JsonOption = False,
) -> None:
    """Check in seconds that a model can be crammed here, and how fast."""
    from memvec import display
    from memvec.doctor import examine

    options = _loading_options(load)
    report = examine(model, revision=revision, device=device, dtype=dtype, **options)
    if json:
        typer.echo(display.to_json(report))
    else:
        display.doctor(report)
    if not report["can_be_crammed"]:
        raise typer.Exit(2)


def _loading_options(options: list[str] | None) -> dict[str, Any]:
    """Keyword arguments of `load_lm` from --load."""
    found: dict[str, Any] = {}
    for item in options or []:
        name, _, value = item.partition("=")
        if name in ("checkpointing", "offload"):
            if value not in ("", "true", "false"):
                raise MemvecError(f"--load {name} is on, or {name}=false, not '{value}'.")
            found[name] = value != "false"
        elif name in ("device_map", "quantize") and value:
            found[name] = value
        else:
            known = ["device_map=auto", "quantize=4bit", "checkpointing", "offload"]
            raise MemvecError(f"--load takes {', '.join(known)}, not '{item}'.")
    return found


def _load(
    name: str,
    revision: str | None,
    device: str,
    dtype: str,
    load: list[str] | None,
    encoder: Path | None = None,
) -> FrozenLM:
    from memvec import display
    from memvec.loading import load_lm

    options = _loading_options(load)
    lm = load_lm(name, revision=revision, device=device, dtype=dtype, encoder=encoder, **options)
    d = lm.description()
    display.say(
        f"{d['name']}: D {lm.width}, V {lm.vocab_size}, {d['dtype']} on {d['device']}, "
        f"{d['attention']} attention, one-pass encoder: {'yes' if lm.encoder else 'no'}"
    )
    return lm


def _open(
    file: str,
    model: str | None,
    revision: str | None,
    device: str,
    dtype: str | None,
    load: list[str] | None,
) -> tuple[MemVectors, FrozenLM]:
    """A file and the model it was made with, in the dtype it was certified in."""
    from memvec.vectors import MemVectors

    mem = MemVectors.load(file)
    made_with = mem.header.model
    name = model or str(made_with.get("name"))
    if model is None and revision is None:
        revision = made_with.get("revision")
    kept = dtype or str(made_with.get("dtype", "auto"))
    bits = made_with.get("quantize")  # decoding needs the same weights
    if bits and not any(item.startswith("quantize=") for item in load or []):
        load = [*(load or []), f"quantize={bits}"]
    return mem, _load(name, revision, device, kept, load)


def _recipe(preset: str, others: list[str] | None, **named: Any) -> Recipe:
    """A preset with the options that were given, those of --set last."""
    changes = {name: value for name, value in named.items() if value is not None}
    for item in others or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise MemvecError(f"--set takes name=value, not '{item}'.")
        changes[name.strip()] = value.strip()
    return Recipe.of(preset, **changes)


def _check_sizes(vectors: int, tokens: int | None, batch_size: int | None) -> None:
    for name, value in (("vectors", vectors), ("tokens", tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise MemvecError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")


def _check_target(target: Path, force: bool) -> None:
    if str(target).encode("utf-8", "replace").decode() != str(target):
        raise MemvecError(  # the safetensors library could not read it again
            f"{os.fsencode(target)!r} is no name in UTF-8: name the file to write with -o."
        )
    if target.is_dir():
        raise MemvecError(f"{target} is a directory: name a file in it with -o.")
    if target.exists() and not force:
        raise MemvecError(f"{target} exists: use --force to overwrite it, or -o for another.")
    if not target.parent.is_dir():
        raise MemvecError(f"there is no folder {target.parent} to write {target.name} in.")
    try:  # a cram may take hours: find out now whether its end can be written
        probe = target.with_name(f".{target.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MemvecError(f"{target.parent} cannot be written to: {error.strerror}.") from None


def _exit_unless_exact(mem: MemVectors) -> None:
    from memvec import codec, display

    if not mem.exact:
        for sentence in codec.failures(mem):
            display.say(sentence)
        raise typer.Exit(3)


def main() -> None:
    """Entry point: errors become one sentence and an exit code; Ctrl-C becomes 130."""
    warnings.showwarning = _one_line
    try:
        app()
    except MemvecError as error:
        typer.echo(f"memvec: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a name that is too long, a disk that went away
        typer.echo(f"memvec: {error.filename or 'a file'}: {error.strerror or error}.", err=True)
        sys.exit(2)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line on standard error, without the place in the code."""
    ours = issubclass(category, SlowPathWarning | UntestedVersionWarning)
    typer.echo(f"memvec: {'' if ours else category.__name__ + ': '}{message}", err=True)


if __name__ == "__main__":
    main()
