"""`memvec encoder`: train a one-pass encoder beside a frozen model, and measure it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli import encoder_plan as plan
from memvec.cli import options
from memvec.cli.common import check_seed
from memvec.cli.encoder_recurrent import print_segments
from memvec.cli.training_text import (
    Column,
    Texts,
    Where,
    checkpointed,
    drawn,
    target_of,
    token_stream,
)
from memvec.errors import MemvecError, check_minimum
from memvec.writing import pretty_json

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from memvec.companions.encoder import TrainedEncoder
    from memvec.encoders.measure import Comparison
    from memvec.encoders.recurrent_measure import SegmentComparison
    from memvec.encoders.training_run import TrainingPlan, TrainingProgress
    from memvec.model.lm import FrozenLM

app = typer.Typer(
    name="encoder",
    help="Train and measure one-pass encoders, whose vectors are a start for cramming.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

ONE_PASS_COLUMNS = ("tokens", "exact", "leading tokens")
CRAMMED_COLUMNS = (  # in 80 characters with their intervals
    *("tokens", "exact from\nencoder", "steps from\nencoder"),
    *("exact from\nnoise", "steps from\nnoise", "steps\nsaved"),
)

# ---------------------------------------------------------------------- train


@app.command(
    epilog=options.examples(
        "memvec encoder train --text books --steps 500",
        "memvec encoder train -m EleutherAI/pythia-160m --text train.jsonl -o pythia.safetensors",
        "memvec encoder train --recurrent --text books --slots 4 -o recurrent.safetensors",
        "memvec encoder train --adapted -m folder --text books --steps 5000",
        "memvec encoder train --usable -m folder --text books --slots 4 --steps 8000",
    )
)
def train(
    text: Texts,
    model: options.Model = "pocket",
    out: plan.Out = None,
    recurrent: plan.Recurrent = False,
    usable: plan.Usable = False,
    adapted: plan.Adapted = False,
    steps: plan.Steps = None,
    slots: plan.Slots = None,
    positions: plan.Positions = None,
    lr: plan.Lr = None,
    seed: plan.Seed = None,
    hidden: plan.Hidden = None,
    layers: plan.Layers = None,
    heads: plan.Heads = None,
    size: plan.Size = None,
    segments: plan.Segments = None,
    lags: plan.Lags = None,
    segment_tokens: plan.SegmentTokens = None,
    rank: plan.Rank = None,
    shortest: plan.Shortest = None,
    longest: plan.Longest = None,
    query_tokens: plan.QueryTokens = None,
    use_weight: plan.UseWeight = None,
    begin: plan.Begin = None,
    where: Where = None,
    column: Column = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
) -> None:
    """Train an encoder, which makes the vectors of a passage in one pass, for a frozen model.

    By default a network beside the model encodes. With --adapted the model itself encodes, with
    low-rank adapters. With --recurrent the encoder reads a document segment by segment, and its
    memory gives back the newest segments. With --usable its vectors also stand for the passage as
    context. After an interruption, the same command continues from its last checkpoint.
    """
    from memvec.companions.encoder_files import ADAPTED_FILE_NAME, FILE_NAME, USABLE_FILE_NAME

    changes: dict[str, Any] = {"steps": steps, "slots": slots, "positions": positions, "lr": lr}
    changes |= {"hidden": hidden, "layers": layers, "heads": heads, "size": size, "seed": seed}
    changes |= {"segments": segments, "lags": lags, "segment_tokens": segment_tokens, "rank": rank}
    changes |= {"shortest": shortest, "longest": longest, "query_tokens": query_tokens}
    changes |= {"begin": begin, "weight": use_weight}
    kind = plan.kind_of(recurrent=recurrent, usable=usable, adapted=adapted)
    choices = plan.plan_of(kind, changes)
    check_seed(seed)
    names = {"usable": USABLE_FILE_NAME, "adapted": ADAPTED_FILE_NAME}
    target = target_of(model, names.get(kind, FILE_NAME), out, force)

    from memvec.loading import load_lm

    lm = load_lm(model, device=device, dtype=dtype)
    _train(lm, token_stream(lm, text, column, where), choices, target)


def _train(lm: FrozenLM, stream: Int[Tensor, " N"], choices: TrainingPlan, target: Path) -> None:
    """Train by a plan and write the encoder."""
    from memvec.cli.display import say
    from memvec.companions.encoder_files import save_encoder

    training = plan.training_of(lm, stream, choices)
    partial = target.with_name(target.name + ".partial")
    with checkpointed(partial):
        encoder = training.run(partial, _progress_lines(training.reached))
    facts = {**training.identity, "seconds": round(training.seconds, 1), "tokens": len(stream)}
    save_encoder(target, encoder, lm, facts)
    partial.unlink(missing_ok=True)
    say(f"{target}: {_what_it_is(encoder, choices, target)}")


def _what_it_is(encoder: TrainedEncoder, choices: TrainingPlan, target: Path) -> str:
    """What was trained, and what to do with it."""
    from memvec.encoders.recurrent_training import RecurrentPlan

    if isinstance(choices, RecurrentPlan):
        return (
            f"a memory of {choices.slots} vector(s), trained on chains of up to "
            f"{choices.segments} segments of {choices.segment_tokens} tokens; memvec encoder "
            f"measure --encoder {target} --segments {choices.segments} shows how far back it gives "
            "them back."
        )
    if encoder.for_use:
        return (
            f"up to {choices.slots} vector(s) of a passage; memvec cram --usable --encoder "
            f"{target} starts from it."
        )
    return (
        f"{choices.slots} slot(s), up to {encoder.tokens} tokens read for a vector; memvec cram "
        f"--encoder {target} starts from it, memvec encoder measure shows what it saves."
    )


def _progress_lines(reached: str) -> Callable[[TrainingProgress], None]:
    """Prints a line every ten seconds, and one for the last step."""
    from memvec.cli.display import say
    from memvec.cli.progress import timer

    due = timer()

    def show(now: TrainingProgress) -> None:
        if not due() and now.step < now.steps:
            return
        left = now.seconds / now.step * (now.steps - now.step)
        say(
            f"step {now.step} of {now.steps}: {now.loss_bits:.2f} bits per token, "
            f"{now.accuracy:.0%} right, {now.target:.3g} {reached}, "
            f"{left / 60:.0f} min left"
        )
        if now.step == now.steps:
            say(
                "The last step is done. For some kinds of encoders, the best passage length is "
                "measured now."
            )

    return show


# ---------------------------------------------------------------------- measure


@app.command(
    epilog=options.examples(
        "memvec encoder measure --text held-out.txt",
        "memvec encoder measure -m EleutherAI/pythia-160m --encoder pythia.safetensors "
        "--text held-out.txt --json",
        "memvec encoder measure --encoder recurrent.safetensors --text held-out.txt --segments 8",
    )
)
def measure(
    text: Texts,
    model: options.Model = "pocket",
    encoder: options.Encoder = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens per vector to measure, with commas.")
    ] = "4,8,12,16,24",
    longest: Annotated[int, typer.Option(help="Tokens of the passages that are crammed.")] = 128,
    passages: Annotated[int, typer.Option(help="Number of passages of each length.")] = 16,
    steps: Annotated[
        int, typer.Option(help="Maximum steps of cramming per passage; 0, with --segments: none.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the places where passages are taken.")] = 0,
    segments: Annotated[
        int | None,
        typer.Option(help="Segments of a document, for a recurrent encoder, instead of --lengths."),
    ] = None,
    lags: Annotated[
        int | None,
        typer.Option(help="With --segments: newest segments to ask for; default: all trained for."),
    ] = None,
    where: Where = None,
    column: Column = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Show an encoder beside cramming: what one pass gives back, and how many steps it saves.

    With --segments: which of a document's newest segments a recurrent encoder's memory gives back.
    """
    from memvec.cramming.recipe import Recipe
    from memvec.loading import load_lm

    tokens_per_vector = _numbers(lengths)
    check_minimum(1, lengths=min(tokens_per_vector), passages=passages, longest=longest)
    check_minimum(1, segments=segments, lags=lags, steps=steps if segments is None else None)
    check_minimum(0, steps=steps)
    if segments is None and lags is not None:
        raise MemvecError("--lags is of recurrent encoders: add --segments.")
    check_seed(seed)
    lm = _with_encoder(load_lm(model, device=device, dtype=dtype), encoder)
    if segments is None:
        from memvec.encoders.measure import compare

        stream = token_stream(lm, text, column, where)
        ids = drawn(stream, text, max(longest, *tokens_per_vector), passages, seed)
        comparison = compare(lm, ids, tokens_per_vector, Recipe.of(steps=steps))
        _show(comparison, json, lambda: _print_comparison(lm.name, comparison))
        return
    from memvec.encoders.recurrent import recurrent_of
    from memvec.encoders.recurrent_measure import check_chain, compare_segments

    recurrent = recurrent_of(lm)
    tokens = segments * recurrent.segment
    check_chain(lm, recurrent, tokens, segments, lags or recurrent.lags, crammed=steps > 0)
    stream = token_stream(lm, text, column, where)
    ids = drawn(stream, text, tokens, passages, seed)
    controls = Recipe.of(steps=steps) if steps else None
    back = compare_segments(lm, ids, segments, lags=lags, recipe=controls)
    _show(back, json, lambda: print_segments(lm.name, back))


def _with_encoder(lm: FrozenLM, file: Path | None) -> FrozenLM:
    """The model with the encoder of a file. Raises MemvecError for one of vectors for use."""
    if file is None:
        return lm
    from memvec.companions.encoder_files import load_encoder

    encoder = load_encoder(file, lm)
    if encoder.for_use:
        raise MemvecError(
            f"{file} is a start of vectors that are to be used, which are measured "
            "instead: memvec cram --usable --preset usable-quick, then memvec verify --use."
        )
    lm.encoder = encoder
    return lm


def _show(
    measured: Comparison | SegmentComparison, json: bool, printed: Callable[[], None]
) -> None:
    """Print what was measured, as JSON or as tables."""
    if json:
        typer.echo(pretty_json(measured.record()))
    else:
        printed()


def _numbers(lengths: str) -> list[int]:
    """The numbers of --lengths. Raises MemvecError."""
    try:
        return [int(part) for part in lengths.split(",")]
    except ValueError:
        raise MemvecError(f"--lengths takes numbers with commas, not '{lengths}'.") from None


def _print_comparison(name: str, comparison: Comparison) -> None:
    from memvec.cli.display import columns_table, out

    n = comparison.rows[0].n
    one_pass = columns_table(f"What one pass gives back, {name}, n {n}", ONE_PASS_COLUMNS)
    cramming = columns_table(f"Cramming from the encoder and from noise, n {n}", CRAMMED_COLUMNS)
    for row in comparison.rows:
        one_pass.add_row(
            str(row.tokens),
            _share(row.one_pass_exact, row.n),
            _mean(row.one_pass_horizon, row.one_pass_interval),
        )
        cramming.add_row(
            str(row.tokens),
            _share(row.encoder_exact, row.n),
            f"{row.encoder_steps:g}",
            _share(row.noise_exact, row.n),
            f"{row.noise_steps:g}",
            f"{row.noise_steps - row.encoder_steps:g}",
        )
    out.print(one_pass)
    out.print(cramming)
    crammed = _mean(comparison.crammed_horizon, comparison.crammed_interval)
    out.print(
        "Exact: share of passages that decode freely. Steps: medians; a passage that is not exact "
        "counts with all its steps. Brackets and ±: 95 % intervals over passages."
    )
    out.print(
        f"Tokens in one vector without loss: {comparison.one_pass_lossless} in one pass (half of "
        f"the passages exact), {crammed} by cramming (mean horizon, n {comparison.crammed_n}). The "
        "paper names 10 for encoders, and 1500 for cramming into Llama-3.1-8B."
    )


def _share(share: float, n: int) -> str:
    from memvec.statistics import share_interval

    return str(share_interval(round(share * n), n))


def _mean(mean: float, half: float) -> str:
    """A mean with the half width of its interval, which is NaN for one passage."""
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"
