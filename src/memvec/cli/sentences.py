"""`memvec lab sentences`: train a model that predicts the next sentence, and look inside."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.cli import options
from memvec.cli.common import check_seed, check_target
from memvec.cli.training_text import Column, Texts, Where, checkpointed, texts_of, was_trained
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.lab.sentences.inspect import Shown
    from memvec.lab.sentences.plan import LatentPlan
    from memvec.lab.sentences.training import LatentProgress
    from memvec.lab.sources.text_readers import NamedText
    from memvec.model.lm import FrozenLM

lab = typer.Typer(
    name="lab",
    help="Experiments: predict a text sentence by sentence.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app = typer.Typer(
    name="sentences",
    help="Train and try a model that predicts the latent (the vectors) of the next sentence.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command(
    epilog=options.examples(
        "memvec lab sentences train --text books -o sentences.safetensors",
        "memvec lab sentences train --text books --loss latents -o latents.safetensors",
    )
)
def train(
    text: Texts,
    out: Annotated[Path, typer.Option("-o", "--out", help="File of the latent model.")],
    model: options.Model = "pocket",
    encoder: options.Encoder = None,
    loss: Annotated[
        str,
        typer.Option(
            help="tokens: cross-entropy of the next sentence's tokens through the frozen model; "
            "latents: squared distance to its encoded latent; both: their sum."
        ),
    ] = "tokens",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    vectors: Annotated[int, typer.Option(help="Vectors per sentence (K).")] = 3,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum length of a sentence; longer ones are cut.")
    ] = 45,
    window: Annotated[int, typer.Option(help="Sentences of a training sequence.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    hidden: Annotated[int, typer.Option(help="Width of the latent model.")] = 384,
    layers: Annotated[int, typer.Option(help="Layers of the latent model.")] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads of the latent model.")] = 6,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    sentences: Annotated[
        int,
        typer.Option(help="Maximum number of sentences, equally many from each text's start."),
    ] = 30_000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    where: Where = None,
    column: Column = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
) -> None:
    """Train a model that predicts the latent of the next sentence, beside a frozen model.

    After an interruption the same command continues from its last checkpoint.
    """
    from memvec.lab.sentences.plan import LatentPlan

    sizes = {"vectors": vectors, "max_tokens": max_tokens, "window": window, "batch": batch}
    sizes |= {"hidden": hidden, "layers": layers, "heads": heads, "sentences": sentences}
    plan = LatentPlan(steps=steps, **sizes, loss=loss, lr=lr, seed=seed)
    check_seed(seed)
    check_target(out, force)
    if out.exists() and not was_trained(out, "memvec-sentences"):
        raise MemvecError(f"{out} is no earlier latent model: name another file with -o.")

    from memvec.loading import load_lm

    lm = load_lm(model, device=device, dtype=dtype, encoder=encoder)
    _train(lm, texts_of(text, column, where), plan, out)


@app.command(
    epilog=options.examples(
        "memvec lab sentences show sentences.safetensors letter.txt",
        "memvec lab sentences show sentences.safetensors letter.txt --cram --json",
    )
)
def show(
    latents: Annotated[Path, typer.Argument(help="A latent model, as train writes it.")],
    file: options.TextFile,
    model: options.ModelOfFile = None,
    encoder: options.Encoder = None,
    cram: Annotated[
        bool, typer.Option("--cram", help="Cram latents until exact; default: encode them.")
    ] = False,
    count: Annotated[int, typer.Option(help="Maximum number of sentences.")] = 20,
    encoding: options.Encoding = "utf-8",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Decode the latent of each sentence, and its prediction from the sentences before."""
    from memvec.lab.sentences.files import model_of
    from memvec.passages.documents import peek

    peek(file)
    name = model or model_of(latents)

    from memvec.cramming.recipe import Recipe
    from memvec.lab.sentences.files import load_latent_model
    from memvec.lab.sentences.inspect import look
    from memvec.loading import load_lm
    from memvec.passages.documents import read_document

    lm = load_lm(name, device=device, dtype=dtype, encoder=encoder)
    latent_model = load_latent_model(latents, lm)
    document = read_document(lm, file, encoding=encoding)
    text = document.data(lm).decode(encoding)
    recipe = Recipe() if cram else None
    steps = look(lm, latent_model, text, name=document.name, count=count, recipe=recipe)
    if json:
        typer.echo(jsonlib.dumps([step.record() for step in steps], indent=1))
    else:
        _print_steps(steps)


def _print_steps(steps: Iterable[Shown]) -> None:
    from memvec.cli.display import out, safe

    for step in steps:
        part = "" if step.whole else ", a part of a longer sentence"
        exact = "[green]exact[/green]" if step.exact else f"[red]{safe(step.decoded)}[/red]"
        out.print(f"[bold]{step.number}[/bold] {safe(step.sentence)} ({step.tokens} tokens{part})")
        out.print(f"  its latent:   {exact}")
        out.print(f"  predicted:    {safe(step.predicted)}")
        out.print(
            f"  bits a token: {step.predicted_bits:.2f} after the prediction, "
            f"{step.discretised_bits:.2f} after it written and encoded again, {step.text:.2f} "
            f"after the text before, {step.alone:.2f} after nothing"
        )


def _train(lm: FrozenLM, texts: list[NamedText], plan: LatentPlan, out: Path) -> None:
    """Train on texts and write the latent model."""
    from memvec.cli.display import say
    from memvec.lab.sentences.cutting import cut_sentences, need_two, share_cut
    from memvec.lab.sentences.files import save_latent_model
    from memvec.lab.sentences.training import LatentTraining, of_each

    share = of_each(plan.sentences, len(texts))
    documents = [cut_sentences(lm, content, plan.max_tokens, share) for _, content in texts]
    if len(documents) == 1:
        need_two(documents[0], texts[0][0])
    sentences = [s for document in documents for s in document]
    say(
        f"{len(sentences)} sentences of {len(texts)} text(s), {share_cut(sentences):.0%} of them "
        f"parts of sentences longer than {plan.max_tokens} tokens."
    )
    training = LatentTraining(lm, documents, plan, _encoding_lines())
    partial = out.with_name(out.name + ".partial")
    with checkpointed(partial):
        latent_model = training.run(partial, _progress_lines())
    save_latent_model(out, latent_model, lm)
    partial.unlink(missing_ok=True)
    say(f"{out}: memvec lab sentences show {out} TEXT decodes its predictions.")


def _encoding_lines() -> Callable[[int], None]:
    """Prints a line every ten seconds while sentences are encoded."""
    from memvec.cli.display import say
    from memvec.cli.progress import timer

    due = timer()

    def show(done: int) -> None:
        if due():
            say(f"{done} sentences encoded")

    return show


def _progress_lines() -> Callable[[LatentProgress], None]:
    """Prints a line every ten seconds, and one for each check of held-out sentences."""
    from memvec.cli.display import say
    from memvec.cli.progress import timer

    due = timer()

    def show(now: LatentProgress) -> None:
        if not due() and now.held_out is None:
            return
        left = now.seconds / now.step * (now.steps - now.step)
        bits = "" if now.bits != now.bits else f"{now.bits:.2f} bits per token, "
        which = "of training text (none is held out)" if now.of_training else "held out"
        held_out = "" if now.held_out is None else f", {now.held_out:.3f} bits per token {which}"
        say(
            f"step {now.step} of {now.steps}: {bits}squared distance {now.distance:.3f}{held_out}, "
            f"{left / 60:.0f} min left"
        )

    return show
