"""`memvec encoder`: train a one-pass encoder beside a frozen model, and measure it."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from memvec.encoders.measure import Comparison
    from memvec.model.lm import FrozenLM

app = typer.Typer(
    name="encoder",
    help="One-pass encoders beside a frozen model: a start for cramming, and its baseline.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder or 'pocket'.")]
TextOption = Annotated[
    str, typer.Option("--text", help="txt, jsonl, parquet, csv, a folder of them, or -.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option(help="Keep table rows with COLUMN=VALUE, e.g. split=train.")
]
ColumnOption = Annotated[str, typer.Option(help="Column of a table that holds the text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
DtypeOption = Annotated[str, typer.Option(help="Dtype of the frozen model: auto, float32 ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def train(
    text: TextOption,
    model: ModelOption = "pocket",
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Default: encoder.safetensors, in the model's folder."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    slots: Annotated[int, typer.Option(help="Most vectors it gives at once.")] = 1,
    hidden: Annotated[int, typer.Option(help="Width of the encoder.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the encoder.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads of the encoder.")] = 4,
    positions: Annotated[int, typer.Option(help="Positions of the model per step.")] = 2048,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    size: Annotated[float, typer.Option(help="Size of the vectors it begins with.")] = 12.8,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    where: WhereOption = None,
    column: ColumnOption = "text",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: Annotated[bool, typer.Option(help="Overwrite an encoder that is there.")] = False,
) -> None:
    """Train an encoder for a frozen model: it encodes passages into slots and gives them back.

    Interrupted? The same command goes on from its last checkpoint.
    """
    from memvec.display import say
    from memvec.encoders.files import save_encoder
    from memvec.encoders.training import Plan, Training, TrainingProgress
    from memvec.loading import load_lm

    plan = Plan(
        steps=steps,
        slots=slots,
        hidden=hidden,
        layers=layers,
        heads=heads,
        positions=positions,
        lr=lr,
        size=size,
        seed=seed,
    )
    target = out or (Path(model) if Path(model).is_dir() else Path()) / "encoder.safetensors"
    if target.exists() and not force:
        raise MemvecError(f"{target} exists: use --force to overwrite it, or -o for another.")
    if not target.parent.is_dir():
        raise MemvecError(f"there is no folder {target.parent} to write {target.name} in.")
    lm = load_lm(model, device=device, dtype=dtype)
    stream = _stream(lm, text, column, where)
    training = Training(lm, stream, plan)
    said = 0.0

    def show(now: TrainingProgress) -> None:
        nonlocal said
        if now.seconds - said < 10 and now.step < now.steps:
            return
        said = now.seconds
        left = now.seconds / now.step * (now.steps - now.step)
        say(
            f"step {now.step} of {now.steps}: {now.loss_bits:.2f} bits per token, "
            f"{now.accuracy:.0%} right, {now.target:.1f} tokens per vector, "
            f"{left / 60:.0f} min left"
        )

    partial = target.with_name(target.name + ".partial")
    encoder = training.run(partial, show)
    save_encoder(
        target,
        encoder,
        lm,
        {**training.identity, "seconds": round(training.seconds, 1), "tokens": len(stream)},
    )
    partial.unlink(missing_ok=True)
    say(
        f"{target}: {slots} slot(s), best at {encoder.tokens} tokens per vector; memvec cram "
        f"--encoder {target} starts from it, memvec encoder measure says what it saves."
    )


@app.command()
def measure(
    text: TextOption,
    model: ModelOption = "pocket",
    encoder: Annotated[
        Path | None, typer.Option(help="Encoder file; default: the one in the model's folder.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens per vector to measure, with commas.")
    ] = "4,8,12,16,24",
    longest: Annotated[int, typer.Option(help="Tokens of the passages that are crammed.")] = 96,
    passages: Annotated[int, typer.Option(help="How many passages of each length.")] = 16,
    steps: Annotated[int, typer.Option(help="Most steps of cramming.")] = 400,
    seed: Annotated[int, typer.Option(help="Where the passages are taken.")] = 0,
    where: WhereOption = None,
    column: ColumnOption = "text",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show an encoder beside cramming: what one pass gives back, and how many steps it saves."""
    import torch

    from memvec.cramming.recipe import Recipe
    from memvec.encoders.measure import compare
    from memvec.loading import load_lm

    try:
        asked = [int(part) for part in lengths.split(",")]
    except ValueError:
        raise MemvecError(f"--lengths takes numbers with commas, not '{lengths}'.") from None
    if min(asked) < 1 or passages < 1:
        raise MemvecError("--lengths and --passages start at 1.")
    lm = load_lm(model, device=device, dtype=dtype, encoder=encoder)
    stream = _stream(lm, text, column, where)
    longest = max(longest, *asked)
    if len(stream) < longest + passages:
        raise MemvecError(f"{text} has {len(stream)} tokens, too few for passages of {longest}.")
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - longest + 1, (passages, 1), generator=draw)
    found = compare(lm, stream[starts + torch.arange(longest)], asked, Recipe.of(steps=steps))
    if json:
        typer.echo(jsonlib.dumps(found.record(), indent=1))
    else:
        _table(lm.name, found)


def _stream(lm: FrozenLM, text: str, column: str, where: list[str] | None) -> Int[Tensor, " N"]:
    """Token ids of all the text, one text after the other."""
    import torch

    from memvec.passages.text_readers import read_texts

    wanted = {}
    for pair in where or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise MemvecError(f"--where takes COLUMN=VALUE, not '{pair}'.")
        wanted[name] = value
    ids: list[int] = []
    for _, one in read_texts(text, None, column, wanted):
        # in pieces: the tokens of a novel at once take a hundred times its size in memory
        for at in range(0, len(one), 100_000):
            ids += lm.tokenize(one[at : at + 100_000])
    return torch.tensor(ids)


def _table(name: str, found: Comparison) -> None:
    from rich.table import Table

    from memvec.display import out

    n = found.rows[0].n
    table = Table(title=f"One-pass encoder beside cramming, {name}, n {n}", title_justify="left")
    for column in (
        "tokens",
        "one pass: exact",
        "leading tokens",
        "crammed from encoder",
        "steps",
        "from noise",
        "steps",
        "fewer",
    ):
        table.add_column(column, justify="right")
    for row in found.rows:
        fewer = row.noise_steps / max(row.encoder_steps, 1)
        table.add_row(
            str(row.tokens),
            f"{row.one_pass_exact:.0%}",
            f"{row.one_pass_horizon:.1f}",
            f"{row.encoder_exact:.0%}",
            f"{row.encoder_steps:g}",
            f"{row.noise_exact:.0%}",
            f"{row.noise_steps:g}",
            f"{fewer:.1f} x",
        )
    out.print(table)
    out.print(
        f"Tokens in one vector without loss: {found.one_pass_lossless} in one pass (half of the "
        f"passages exact), {found.crammed_horizon:.1f} ± {found.crammed_interval:.1f} by cramming "
        f"(mean horizon, n {found.crammed_n}). The paper's scale: 10 for encoders, 1500 for "
        "cramming into Llama-3.1-8B."
    )
