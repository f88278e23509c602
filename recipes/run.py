"""A training run: what a checkpoint holds, the learning rates of a step, and its gradients.

`pocket.py` imports this module; it is not run.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from decoder import Decoder, Shape
from encoder import Encoder
from graphs import Graphs
from lengths import Lengths
from memvec.errors import MemvecError
from optimizers import optimizers_of
from recipe import Recipe

# Fields of a recipe that may change when a run is resumed, and fields that its trunk depends on.
MAY_CHANGE = {"steps", "minutes", "decay_share", "checkpoint_every", "log_every"}
OF_TRUNK = {"seed", "trunk_steps", "trunk_tokens"}


@dataclass
class StepRecord:
    """The losses of a step, still on the device, and the sizes of its passages."""

    values: dict = field(default_factory=dict)
    """Name of a loss, or of an accuracy → tensor of one number."""
    K: int = 0
    """Vectors of a passage."""
    T: int = 0
    """Tokens of a passage."""
    share: float = 0.0
    """T divided by the target length."""
    inner: bool = False
    """Whether the vectors took steps of descent."""


@dataclass
class Run:
    """Model, encoder, optimisers, target lengths, and how far the training has come."""

    recipe: Recipe
    shape: Shape
    device: str = "cpu"

    def __post_init__(self):
        torch.manual_seed(self.recipe.seed)
        # Weights are drawn on the CPU, so that a seed gives the same weights on every device.
        self.model = Decoder(self.shape).to(self.device)
        self.encoder = Encoder(self.shape.hidden_size).to(self.device)
        self.optimizers = optimizers_of(self.model, self.encoder, self.recipe, self.device)
        self.base_rates = [[float(g["lr"]) for g in opt.param_groups] for opt in self.optimizers]
        self.parameters = [*self.model.parameters(), *self.encoder.parameters()]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.graphs = Graphs(self.device)
        self.step = 0
        self.tokens = {"text": 0, "memory": 0}
        self.lengths = Lengths(self.recipe, self.shape)
        self.seconds = 0.0
        self.unread = StepRecord()

    def save(self, path: Path):
        """Write a checkpoint. The file gets its name when it is complete."""
        lengths = self.lengths
        state = {
            "model": self.model.state_dict(),
            "encoder": self.encoder.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.optimizers],
            "progress": (self.step, self.tokens, lengths.targets, lengths.accuracy, self.seconds),
            "inner_targets": lengths.inner_targets,
            "shape": dataclasses.asdict(self.shape),
            "recipe": dataclasses.asdict(self.recipe),
        }
        aside = path.with_suffix(".part")
        torch.save(state, aside)
        aside.replace(path)

    def load(self, path: Path, trunk: bool = False):
        """Continue from a checkpoint. Raises MemvecError if it is of another shape or recipe.

        With `trunk` only the fields that the trunk depends on must be the same.
        """
        state = torch.load(path, weights_only=True, map_location=self.device)
        recipe = dataclasses.asdict(self.recipe)
        fixed = OF_TRUNK if trunk else set(recipe) - MAY_CHANGE
        choices = dataclasses.asdict(self.shape) | {name: recipe[name] for name in fixed}
        made_with = state["shape"] | state["recipe"]
        for name, value in choices.items():
            if made_with.get(name, value) != value:  # fields added since then are not compared
                raise MemvecError(
                    f"{path} was made with --{name.replace('_', '-')} {made_with[name]}, not "
                    f"{value}: use another --work."
                )
        try:
            self.model.load_state_dict(state["model"])
            self.encoder.load_state_dict(state["encoder"])
            for opt, saved in zip(self.optimizers, state["optimizers"], strict=True):
                opt.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise MemvecError(
                f"{path} is of another shape or recipe: use another --work."
            ) from error
        lengths = self.lengths
        self.step, self.tokens, lengths.targets, lengths.accuracy, self.seconds = state["progress"]
        lengths.inner_targets = state["inner_targets"]

    def begin_with(self, folder: Path):
        """Load the weights of an exported folder. The optimisers start without a state."""
        try:
            weights, encoder = (
                load_file(folder / f"{name}.safetensors", device=self.device)
                for name in ("model", "encoder")
            )
            weights.pop("lm_head.weight", None)  # tied
            self.model.load_state_dict(weights)
            self.encoder.load_state_dict(encoder)
        except FileNotFoundError as error:
            raise MemvecError(f"--begin {folder}: it has no model and encoder.") from error
        except RuntimeError as error:
            raise MemvecError(f"--begin {folder}: that model has another shape.") from error

    def half_width(self):
        """A context in which products are computed in bfloat16; weights stay float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, the larger of the two."""
        recipe = self.recipe
        timed = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return max(self.step / recipe.steps, timed)

    def before(self, planned: int) -> bool:
        """Whether the run is before step `planned`, or with --minutes before its share of time."""
        return self.progress < planned / self.recipe.steps

    def set_rates(self) -> float:
        """Set the learning rates: linear warm-up, constant, linear decay to zero at the last step.

        Returns the factor by which the recipe's rates are multiplied in this step.
        """
        recipe = self.recipe
        left = max(0.0, 1 - self.progress) / recipe.decay_share
        factor = min((self.step + 1) / recipe.warmup_steps, 1.0, left)
        for opt, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"].fill_(rate * factor)
        return factor

    def on_device(self, ids):
        """Token ids (B, T) on the device; the program does not wait for the copy."""
        return ids.pin_memory().to(self.device, non_blocking=True) if self.graphs.on_gpu else ids

    def add_gradients(self, name, losses, *inputs):
        """Add the gradients of the first value of losses(*inputs). Returns all values.

        `name` is the name of the CUDA graph: different losses with inputs of the same shapes have
        different graphs.
        """

        def work(*inputs):
            with self.half_width():
                loss, *others = losses(*inputs)
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            pairs = [
                (p.grad, g)
                for p, g in zip(self.parameters, gradients, strict=True)
                if g is not None
            ]
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
            return loss.detach(), *others

        return self.graphs(name, work, *inputs)

    def move(self):
        """Take a step of both optimisers and set the gradients to zero."""
        for opt in self.optimizers:
            opt.step()
        torch._foreach_zero_([p.grad for p in self.parameters])
        return ()
