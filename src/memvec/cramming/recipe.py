"""A recipe: every choice that changes the vectors, in one frozen, validated dataclass.

The text of each field is also the command line's help and the documentation. A preset is a function
that is registered under a name and returns a recipe. `Recipe()` is the default preset, and
`Recipe.of("paper", steps=100)` is the preset `paper` with one change. The published recipes are in
`memvec.arms.presets`. A preset of your own:

    @register("preset", "mine")
    def mine():
        return Recipe(schedule="whole", lr=0.05)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from memvec import plugins, registry
from memvec.cramming.fields import (
    CHOICES,
    MINIMUM,
    REGISTERED,
    ComputeName,
    FrontName,
    NotExactName,
    StartRuleName,
    UnitName,
    choices,
    converted,
)
from memvec.errors import MemvecError, did_you_mean

# Fields that only the term 'use' reads: without it, they must have their default.
FOR_USE = ("objective_every", "neighbours", "term_rise", "context_scale")


def documented(default: Any, text: str) -> Any:
    """A dataclass field with a default value and a help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """All choices that change the vectors. The defaults were the best in our measurements.

    Raises MemvecError for a value that its field does not accept.
    """

    objective: str = documented(
        "cross-entropy",
        "the loss that is minimised: 'cross-entropy'; 'deficit', cross-entropy in which a token's "
        "weight is what its margin lacks; 'margin', which compares with the best wrong token only",
    )
    temperature: float = documented(0.2, "the loss divides logits by this; 1 logit in the paper")
    margin: float = documented(0.28, "a token counts as right when its logit leads by this much")
    unit: UnitName = documented(
        "spread",
        "the unit of temperature and margin: 'spread', the standard deviation of the model's "
        "logits over its vocabulary, so that one recipe fits all models; or 'logits'",
    )
    term: str = documented(
        "none",
        "a second loss: 'use', the divergence from the model that has read the text, so that the "
        "vectors stand for it as context; 'alignment', the distance of the hidden states from "
        "those of the plain text; 'none'",
    )
    term_weight: float = documented(4.0, "weight of the second loss; the objective has weight 1")
    term_rise: float = documented(
        0.0, "for 'use': relative rise of its weight after a step with all tokens right; 0: fixed"
    )
    context_scale: float = documented(
        1.0,
        "for 'use': factor of the vectors in context mode; below 1, the model can tell the modes "
        "apart by the size of the vectors, and the stored vectors and learning rates are larger",
    )
    objective_every: int = documented(
        1, "for 'use': steps from one objective to the next, until step `settle`; 1: every step"
    )
    align_layers: int = documented(4, "layers whose hidden states 'alignment' compares")
    queries: str = documented(
        "continuations",
        "what the model reads after the vectors for 'use': 'continuations' of the text by the "
        "model itself, 'samples' that it writes without the text, or the path of a file with a "
        "question on each line, which the model answers",
    )
    neighbours: str = documented(
        "none",
        "for 'use': a file of usable vectors to read beside the passage's in most queries",
    )
    query_count: int = documented(16, "queries of each passage; a step uses one of them")
    query_tokens: int = documented(48, "tokens of a query, its answer included")
    teacher_top: int = documented(
        256, "likeliest tokens kept of each distribution; of the others, their sum is kept"
    )
    settle: int = documented(
        0,
        "minimum number of steps of a passage; of the vectors with all tokens right in these "
        "steps, those with the smallest second loss are kept; 0: the passage is done at the first",
    )
    schedule: str = documented(
        "growing",
        "tokens that count in the loss: 'growing', the leading right tokens and a look-ahead; "
        "'geometric', a number of leading tokens that doubles when they are right; 'whole', all",
    )
    look_ahead: int = documented(
        8, "tokens per vector that are added together when all tokens that count are right"
    )
    narrow_after: int = documented(
        12,
        "steps without progress after which the look-ahead is halved; it grows again when all "
        "tokens that count are right; 0: it is never halved",
    )
    stuck_after: int = documented(
        20,
        "steps without progress after which a passage is stuck: its temperature falls, at most to "
        "a third, until there is progress, and its vectors become large and stay so; 0: never",
    )
    space: str = documented(
        "inputs",
        "what the numbers of a vector are: 'inputs', an input of the model; 'prefix', a key and a "
        "value in every layer; 'prefix-layer', a key and a value in one layer; 'shared-basis', "
        "`dimensions` coefficients of an input",
    )
    layer: int = documented(0, "the layer of 'prefix-layer'; the first layer is 0")
    coordinates: str = documented(
        "direct",
        "the parameters that the optimizer moves: 'direct', the numbers; 'whitened', the numbers "
        "scaled along the principal directions of the model's gradients, which saves a sixth of "
        "the forward-backward tokens and takes 4 D short passes once for a model; 'principal', "
        "coordinates along these directions, for 'nadam'; 'low-dim', coefficients and a matrix",
    )
    dimensions: int = documented(
        256, "coefficients per vector of 'low-dim' coordinates and of the space 'shared-basis'"
    )
    optimizer: str = documented(
        "full-matrix",
        "the optimizer: 'full-matrix', Adam's step with its direction changed by the matrix of the "
        "passage's last gradients; 'nadam', Adam with Nesterov's momentum; 'adam'; 'adamw'",
    )
    lr: float = documented(
        0.1,
        "learning rate; with lr_large, only for vectors that begin from an encoder, multiplied by "
        "their size (RMS) where that is above 1; 0: 0.5 for GPT-NeoX (Pythia) and 0.1 for other "
        "models, as in the published runs of progressive cramming",
    )
    lr_large: float = documented(
        12.8,
        "learning rate and minimum size (RMS) of all other vectors, and of an encoder's after "
        "their passage was stuck: a large vector needs fewer steps and holds more; 0: lr for all",
    )
    warmup: int = documented(0, "moves in which the learning rate rises from 0")
    decay: int = documented(
        0, "moves after which the rate has fallen along a cosine to lr_end; 0: it does not fall"
    )
    lr_end: float = documented(1e-3, "learning rate after `decay` moves")
    beta1: float = documented(0.95, "decay of the mean gradient")
    beta1_rise: float = documented(
        0.4,
        "after t moves the decay of the mean gradient is 1 - 1 / (1 + 0.8 t^beta1_rise), at most "
        "beta1, so that the first moves follow their own gradient; 0: beta1 from the first move",
    )
    beta2: float = documented(0.7, "decay of the mean squared gradient")
    weight_decay: float = documented(0.0, "decoupled weight decay (adamw)")
    start: str = documented(
        "auto",
        "the first vectors: 'encoder', 'noise', 'last-tokens', 'embeddings', 'uniform', 'normal' "
        "or 'linear'; \"saved(file='FILE')\": those of a file; 'auto': 'encoder' if the model has "
        "a one-pass encoder for such vectors, else 'noise', or for 'use' 'last-tokens'",
    )
    start_rule: StartRuleName = documented(
        "vectors",
        "what follows the vectors: 'vectors', nothing; 'bos', the model's BOS; 'first-token', the "
        "passage's first token; 'paper', BOS if the tokenizer adds one, else the first token",
    )
    front: FrontName = documented(
        "none",
        "the inputs in front of the vectors: 'none', as in the paper; 'bos', the model's BOS, as "
        "in front of a text; 'auto': BOS, if the model has one and vectors are inputs",
    )
    trigger: str = documented(
        "bos",
        "what is between the vectors and the passage under the start rule 'bos': 'bos', the text "
        "of another token, its number as '#17', a file of 'memvec trigger train', or 'auto': the "
        "trigger in the model's folder, if there is one and vectors are inputs, else BOS",
    )
    compute: ComputeName = documented(
        "auto",
        "the dtype of steps: 'model', the model's own; 'bfloat16', a rounded copy of its weights; "
        "'auto': bfloat16 for float32 models on a CPU that multiplies bfloat16 matrices. "
        "Certification always uses the model's own dtype",
    )
    steps: int = documented(1500, "maximum number of optimiser steps for a passage")
    patience: int = documented(300, "steps without progress after which a passage is given up")
    if_not_exact: NotExactName = documented(
        "raise-margin",
        "for a passage that meets its margins and does not decode: 'raise-margin', cramming "
        "continues with twice the margin; 'stop', it ends with the present vectors",
    )
    budget: int = documented(
        0, "maximum forward-backward tokens for a passage, checked after each step; 0: no limit"
    )
    corrections: int = documented(
        0, "maximum number of tokens of a passage that the vectors may miss and the file then lists"
    )
    seed: int = documented(0, "seed of random numbers, together with each passage's token ids")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = converted(item.name, getattr(self, item.name), type(item.default))
            object.__setattr__(self, item.name, value)
        for name in (*REGISTERED, *CHOICES):
            value, allowed = getattr(self, name), choices(name)
            if name in REGISTERED and value.partition("(")[0] in registry.names(name):
                object.__setattr__(self, name, registry.spelled(name, value))
            elif value not in allowed:
                end = plugins.ADD if name in REGISTERED else "."
                raise MemvecError(
                    f"the recipe's {name} cannot be '{value}': it is one of "
                    f"{', '.join(allowed)}{end}"
                )
        if plugins.plain(self.queries) in registry.names("queries"):  # otherwise a path of a file
            object.__setattr__(self, "queries", registry.spelled("queries", self.queries))
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if not value >= minimum or value == float("inf"):
                raise MemvecError(f"the recipe's {name} must be at least {minimum:g}, not {value}.")
        for name in FOR_USE:
            if self.term != "use" and not self._is_default(name):
                raise MemvecError(f"the recipe's {name} is for use only: take the preset 'usable'.")
        if abs(self.seed) >= 2**63:
            raise MemvecError(f"the recipe's seed must fit 64 bits; {self.seed} does not.")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise MemvecError(f"the recipe's {name} must be in [0, 1), not {value}.")

    @classmethod
    def of(cls, preset: str = "default", /, **changes: Any) -> Recipe:
        """A preset with changed fields. Raises MemvecError for an unknown name or a wrong value."""
        base = registry.get("preset", preset)()
        if not isinstance(base, Recipe):
            raise MemvecError(f"the preset '{preset}' gives no Recipe but {type(base).__name__}.")
        kinds = {item.name: type(item.default) for item in fields(cls)}
        named = {name.replace("-", "_"): value for name, value in changes.items()}
        for name in [name for name in named if name not in kinds]:
            raise MemvecError(f"a recipe has no '{name}': {did_you_mean(name, kinds)}")
        # The constructor converts values, too, but its annotations allow no text for a number.
        return replace(base, **{n: converted(n, v, kinds[n]) for n, v in named.items()})

    def in_logits(self, spread: float) -> Recipe:
        """The same recipe with temperature and margin in logits.

        `spread` is the standard deviation of the model's logits (`FrozenLM.logit_spread`).
        """
        if self.unit == "logits":
            return self
        temperature, margin = self.temperature * spread, self.margin * spread
        return replace(self, unit="logits", temperature=temperature, margin=margin)

    def for_family(self, family: str) -> Recipe:
        """The same recipe; an lr of 0 becomes the rate for models of this `model_type`."""
        return self if self.lr else replace(self, lr=0.5 if family == "gpt_neox" else 0.1)

    def record(self) -> dict[str, Any]:
        """The recipe as a plain dictionary, for files and stores.

        Space, layer, front and the fields for 'use' only are left out at their default. They are
        newer than the first files, and a recipe without them still has the same record.
        """
        absent = {name for name in (*FOR_USE, "front") if self._is_default(name)}
        absent |= {"space", "layer"} if self.space == "inputs" else set()
        return {name: value for name, value in asdict(self).items() if name not in absent}

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(type(self), name))
