"""Common parts of training encoders with adapters: sizes, and continuing from an encoder's file.

Such an encoder is the frozen LM itself with low-rank adapters (`adapters.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from memvec.companions.encoder import TrainedEncoder
from memvec.companions.encoder_files import load_encoder
from memvec.encoders.training_run import TrainingPlan, TrainingRun
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.writing import path_of


@dataclass(frozen=True)
class AdapterPlan(TrainingPlan):
    """The choices of every run that trains adapters. Lengths in tokens per vector.

    Raises MemvecError for a choice out of range.
    """

    slots: int = 4
    rank: int = 64
    """Rank of the adapters."""
    shortest: int = 4
    longest: int = 12
    """Tokens per vector of the shortest and the longest passages."""
    begin: str = ""
    """File of an encoder of the same kind that goes on being trained; none: a new one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_1("rank", "shortest")
        if self.longest < self.shortest:
            raise MemvecError(
                f"longest must be at least {self.shortest}, the tokens per vector of the shortest "
                f"passages, not {self.longest}."
            )


class AdapterTraining(TrainingRun):
    """A training run of an encoder with adapters; `makes` is the encoder's class.

    Raises MemvecError as `TrainingRun`, and for a model with gradient checkpointing.
    """

    makes: ClassVar[type[TrainedEncoder]]
    plan: AdapterPlan

    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: AdapterPlan) -> None:
        super().__init__(lm, stream, plan)
        if lm.checkpointing:  # it would recompute layers after the adapters are removed
            raise MemvecError("adapters are trained without checkpointing: leave it out.")

    def begin(self) -> None:
        """Load the parameters of the plan's encoder, if it names one, and make the optimiser.

        The run's identity then contains the hash of that encoder's file. Raises MemvecError as
        `load_encoder` does, for an encoder of another kind, and if its rank, or the slots of a
        usable one, differ from --rank or --slots. An adapted encoder has one summary for any
        --slots.
        """
        if self.plan.begin:
            path = path_of(self.plan.begin)
            encoder = load_encoder(path, self.lm)
            if not isinstance(encoder, self.makes):
                kind = self.makes.kind
                raise MemvecError(f"{path} is no {kind} encoder to begin from.")
            try:
                self.network.load_state_dict(encoder.network.state_dict())
            except RuntimeError:
                rank = len(encoder.network.state_dict()["adapters.down.0"])
                raise MemvecError(
                    f"{path} has {encoder.max_vectors} slots of rank {rank}: begin with the "
                    "same slots and rank."
                ) from None
            self.identity["plan"]["begin"] = encoder.identity
        self.network.to(self.lm.device)
        self.optimizer = self.optimized(self.network.parameters())
