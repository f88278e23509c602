"""`memvec trigger`: train the soft tokens after which usable vectors give their passage back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.cli import options
from memvec.cli.common import check_seed
from memvec.cli.training_text import (
    Column,
    Texts,
    Where,
    checkpointed,
    drawn,
    target_of,
    token_stream,
)
from memvec.errors import MemvecError

# Fields of the recipe that the training sets itself.
OWN_FIELDS = {"trigger", "start_rule", "steps", "patience", "if_not_exact", "space"}
OWN_FIELDS |= {"objective_every", "term_rise"}

if TYPE_CHECKING:
    from memvec.cramming.batch import Progress
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM
    from memvec.usable.trigger_training import BatchReport, TriggerPlan

app = typer.Typer(
    name="trigger",
    help="Train a trigger: soft tokens after which usable vectors give their passage back.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def _group() -> None:
    """Keep `train` a command of a group, beside which others may come."""


@app.command(
    epilog=options.examples(
        "memvec trigger train --text books -o trigger.safetensors",
        "memvec cram letter.txt --usable --vectors 4 --tokens 24 --trigger trigger.safetensors",
    )
)
def train(
    text: Texts,
    model: options.Model = "pocket",
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Default: trigger.safetensors in the model's folder, or here if it has none.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Soft tokens after the vectors.")] = 4,
    front: Annotated[int, typer.Option(help="Soft tokens in front of them, after BOS.")] = 4,
    vectors: Annotated[int, typer.Option(help="Vectors of a passage.")] = 4,
    tokens: Annotated[
        int, typer.Option(help="Tokens of every second passage; the others have twice as many.")
    ] = 24,
    batches: Annotated[int, typer.Option(help="Batches of passages, one after the other.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Passages of a batch.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the trigger.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of its first values and of the passages.")] = 0,
    set_: options.Set = None,
    where: Where = None,
    column: Column = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
) -> None:
    """Train a trigger: soft tokens after which usable vectors give their passage back.

    Vectors are crammed as by 'memvec cram --usable', and the trigger is trained with them. If its
    file is in the model's folder, --usable uses it. After an interruption, the same command
    continues.
    """
    from memvec.cli.display import model as say_model
    from memvec.cli.display import say
    from memvec.companions.triggers import FILE_NAME
    from memvec.loading import load_lm
    from memvec.usable.trigger_training import TriggerPlan

    check_seed(seed)
    sizes = {"rows": rows, "front": front, "vectors": vectors, "tokens": tokens}
    plan = TriggerPlan(**sizes, batches=batches, batch_size=batch_size, lr=lr, seed=seed)
    recipe = _recipe(set_)
    target = target_of(model, FILE_NAME, out, force)
    if target.suffix != ".safetensors":
        raise MemvecError(
            f"name the trigger {target.name}.safetensors: --trigger knows it by that."
        )
    lm = load_lm(model, device=device, dtype=dtype)
    say_model(lm.description())
    stream = token_stream(lm, text, column, where)
    passages = drawn(stream, text, 2 * tokens, batches * batch_size, seed).tolist()
    passages = [ids[: tokens * (1 + i % 2)] for i, ids in enumerate(passages)]
    _train(lm, passages, plan, recipe, target)
    say(f"{target}: {rows + front} soft tokens; memvec cram --usable --trigger {target} uses it.")


def _train(
    lm: FrozenLM, passages: list[list[int]], plan: TriggerPlan, recipe: Recipe, target: Path
) -> None:
    """Train into a file beside the target, which replaces it in the end."""
    from memvec.usable.trigger_training import train_trigger

    partial = target.with_name(target.name + ".partial")
    with checkpointed(partial):
        train_trigger(
            lm,
            passages,
            plan,
            recipe,
            partial,
            on_batch=_line_of_a_batch,
            on_progress=_lines_within_a_batch(plan.batches),
        )
    partial.replace(target)


def _line_of_a_batch(batch: BatchReport) -> None:
    """Print how a batch came out."""
    from memvec.cli.display import say

    left = batch.seconds * (batch.batches - batch.number)
    say(
        f"batch {batch.number} of {batch.batches}: {batch.exact} of {batch.passages} passages "
        f"exact, KL to the text {batch.kl:.3f} nats a token, {left / 60:.0f} min left"
    )


def _lines_within_a_batch(batches: int) -> Callable[[int, Progress, int], None]:
    """Prints a line every ten seconds. After a batch's steps comes one that only measures."""
    from memvec.cli.display import say
    from memvec.cli.progress import timer

    due = timer()

    def show(number: int, now: Progress, steps: int) -> None:
        if due():
            say(
                f"batch {number} of {batches}, step {min(now.steps, steps)} of {steps}: horizon "
                f"{now.horizon:.0f} tokens"
            )

    return show


def _recipe(assignments: list[str] | None) -> Recipe:
    """The preset with --set. Raises MemvecError for fields that the training sets itself."""
    from memvec.cli.common import assigned, recipe_of

    if fixed := sorted(assigned(assignments).keys() & OWN_FIELDS):
        raise MemvecError(
            f"trigger train sets the recipe's {fixed[0]} itself: leave out --set {fixed[0]}."
        )
    return recipe_of("usable", assignments)
