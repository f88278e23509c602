"""The options of `memvec encoder train`, and the plan and run of each kind of encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli.arguments import option_of
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from memvec.encoders.training_run import TrainingPlan, TrainingRun
    from memvec.model.lm import FrozenLM

Out = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        help="Default: encoder.safetensors (with --adapted: adapted-encoder.safetensors, with "
        "--usable: usable-encoder.safetensors), in the model's folder or here.",
    ),
]
Recurrent = Annotated[
    bool, typer.Option("--recurrent", help="Carry a memory from segment to segment.")
]
Usable = Annotated[
    bool, typer.Option("--usable", help="Encode usable vectors: a start for cram --usable.")
]
Adapted = Annotated[
    bool, typer.Option("--adapted", help="The model itself encodes, with low-rank adapters.")
]
Steps = Annotated[int | None, typer.Option(help="Training steps; default: 2000.")]
Slots = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of vectors per passage, or vectors of a memory; default: 1 (4 with "
        "--recurrent, --adapted or --usable)."
    ),
]
Positions = Annotated[
    int | None, typer.Option(help="Positions of the model per step; default: 2048.")
]
Lr = Annotated[
    float | None, typer.Option(help="Learning rate; default: 0.001, or 0.002 with --usable.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of weights and batches; default: 0.")]
Hidden = Annotated[int | None, typer.Option(help="Width of the encoder; default: 256.")]
Layers = Annotated[
    int | None, typer.Option(help="Layers of the encoder; default: 4 (2 with --recurrent).")
]
Heads = Annotated[int | None, typer.Option(help="Attention heads of the encoder; default: 4.")]
Size = Annotated[
    float | None,
    typer.Option(help="Size (RMS) of the encoder's vectors before training; default: 12.8."),
]
Segments = Annotated[
    int | None, typer.Option(help="With --recurrent: segments of the longest chain; default: 8.")
]
Lags = Annotated[
    int | None,
    typer.Option(
        help="With --recurrent: how many of the newest segments to give back; default: 6."
    ),
]
SegmentTokens = Annotated[
    int | None, typer.Option(help="With --recurrent: tokens of a segment; default: 8.")
]
Rank = Annotated[
    int | None, typer.Option(help="With --adapted, --usable: rank of the adapters; default: 64.")
]
Shortest = Annotated[
    int | None,
    typer.Option(
        help="With --adapted, --usable: tokens per vector of the shortest passages; default: 4."
    ),
]
Longest = Annotated[
    int | None,
    typer.Option(
        help="With --adapted, --usable: tokens per vector of the longest passages; default: 28 "
        "with --adapted, 12 with --usable."
    ),
]
QueryTokens = Annotated[
    int | None, typer.Option(help="With --usable: tokens that follow a passage; default: 32.")
]
UseWeight = Annotated[
    float | None,
    typer.Option(help="With --usable: weight of use beside exactness; default: 8."),
]
Begin = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="With --adapted, --usable: an encoder to go on from."),
]


def kind_of(**flags: bool) -> str:
    """The kind of encoder to train, by the options that are set.

    Raises MemvecError for more than one.
    """
    kinds = [kind for kind, is_set in flags.items() if is_set]
    if len(kinds) > 1:
        raise MemvecError(
            f"--{kinds[0]} and --{kinds[1]} are two kinds of encoders: give one of them."
        )
    return kinds[0] if kinds else "slots"


def kinds() -> dict[str, tuple[type[TrainingPlan], Callable[[FrozenLM, Tensor, Any], TrainingRun]]]:
    """The plan and the run of each kind of encoder."""
    from memvec.encoders.adapted_training import AdaptedPlan, AdaptedTraining
    from memvec.encoders.recurrent_training import RecurrentPlan, RecurrentTraining
    from memvec.encoders.training import SlotsPlan, Training
    from memvec.encoders.usable_training import UsablePlan, UsableTraining

    return {
        "slots": (SlotsPlan, Training),
        "recurrent": (RecurrentPlan, RecurrentTraining),
        "usable": (UsablePlan, UsableTraining),
        "adapted": (AdaptedPlan, AdaptedTraining),
    }


def plan_of(kind: str, given: dict[str, Any]) -> TrainingPlan:
    """The plan of a training run from options, None where not given.

    Raises MemvecError for options that this kind of encoder does not have, and for values that no
    plan has.
    """
    plans = {name: plan for name, (plan, _) in kinds().items()}
    known = {name: {field.name for field in fields(plan)} for name, plan in plans.items()}
    given = {name: value for name, value in given.items() if value is not None}
    for name in sorted(given.keys() - known[kind]):
        option = option_of(name)
        others = [other for other in plans if name in known[other]]
        if kind == "slots":
            flags = " or ".join(f"--{other}" for other in others)
            raise MemvecError(f"{option} is of {' and '.join(others)} encoders: add {flags}.")
        raise MemvecError(f"{option} is not of {kind} encoders: leave it out.")
    return plans[kind](**given)


def training_of(lm: FrozenLM, stream: Int[Tensor, " N"], plan: TrainingPlan) -> TrainingRun:
    """The run of a plan."""
    run = next(run for kind, run in kinds().values() if kind is type(plan))
    return run(lm, stream, plan)
