"""A recipe: every choice that changes the vectors, in one frozen, validated, documented object.

The text under each field is the command line's help and the documentation. A preset is a function
that returns a recipe, registered under a name: `Recipe()` is the default one, and
`Recipe.of("paper", steps=100)` is another with changes. The published recipes are in
`memvec.arms.presets`; one of your own is

    @register("preset", "mine")
    def mine():
        return Recipe(schedule="whole", lr=0.05)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from memvec import registry
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

# What is for the term 'use' only, and what it is without it.
FOR_USE: dict[str, Any] = {"objective_every": 1, "neighbours": "none", "term_rise": 0.0}
FOR_USE["context_scale"] = 1.0


def documented(default: Any, text: str) -> Any:
    """A field with a default and the sentence that help texts show."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How passages are crammed. Defaults are the best we know (docs/log.md)."""

    objective: str = documented("cross-entropy", "what is minimised")
    temperature: float = documented(0.2, "what logits are divided by; the paper's: 1 logit")
    margin: float = documented(0.28, "a token counts as right when its logit leads by this much")
    unit: UnitName = documented(
        "spread",
        "what temperature and margin are counted in: 'spread', the standard deviation of the "
        "model's logits over its vocabulary, so that one recipe fits all models; or 'logits'",
    )
    term: str = documented(
        "none",
        "a second loss: 'use', the divergence from the model that has read the text, so that the "
        "vectors stand for it as context; 'alignment', the distance of the hidden states from "
        "those of the plain text; 'none'",
    )
    term_weight: float = documented(4.0, "what the second loss weighs beside the objective")
    term_rise: float = documented(
        0.0, "for 'use': the share by which its weight rises after an exact step; else it falls"
    )
    context_scale: float = documented(
        1.0,
        "for 'use': what the vectors are multiplied by where they are read as context; below 1 the "
        "two modes differ in their size, too, and rates are those of the larger vectors",
    )
    objective_every: int = documented(
        1, "for 'use': one step of so many has the passage's own loss, until it is to settle"
    )
    align_layers: int = documented(4, "layers whose hidden states 'alignment' compares")
    queries: str = documented(
        "continuations",
        "what the model reads behind the vectors for 'use': 'continuations' of the text by the "
        "model itself, 'samples' that it writes without the text, or the path of a file with a "
        "question on each line, which the model answers",
    )
    neighbours: str = documented(
        "none", "for 'use': a file of usable vectors to stand beside the passage's in most queries"
    )
    query_count: int = documented(16, "queries of each passage; a step takes one of them")
    query_tokens: int = documented(48, "tokens of a query with the answer")
    teacher_top: int = documented(
        256, "tokens of the model's distribution that are kept beside the mass of all others"
    )
    settle: int = documented(
        0,
        "smallest number of steps of a passage; of the exact vectors on the way, those with the "
        "smallest second loss are kept; 0: it is done once it is exact",
    )
    schedule: str = documented(
        "growing",
        "'growing': the leading right tokens and a look-ahead count; 'geometric': a number of "
        "leading tokens that doubles when they are right; 'whole': all",
    )
    look_ahead: int = documented(
        8, "tokens per vector that come to count together, once all that counted are right"
    )
    narrow_after: int = documented(
        12,
        "steps without progress after which the look-ahead is halved, to widen again by a token "
        "with each that comes right; 0: it stays",
    )
    stuck_after: int = documented(
        20,
        "steps without progress after which a passage is stuck: the temperature falls, to a third "
        "at the lowest, until there is progress, and its vectors are large from then on; 0: never",
    )
    space: str = documented(
        "inputs",
        "where the numbers of a vector stand: 'inputs', in the model's input; 'prefix', as a key "
        "and a value in every layer; 'prefix-layer', in one layer; 'shared-basis', as `dimensions` "
        "coefficients of an input",
    )
    layer: int = documented(0, "the layer of 'prefix-layer', the first is 0")
    coordinates: str = documented(
        "direct",
        "what is moved: 'direct', the numbers; 'whitened', these scaled along the model's main "
        "directions, which saves a sixth of the forward-backward tokens and takes 4 D short passes "
        "once for a model; 'principal', turned into these directions, for 'nadam'",
    )
    dimensions: int = documented(
        256, "coefficients per vector of 'low-dim' coordinates and of the space 'shared-basis'"
    )
    optimizer: str = documented(
        "full-matrix",
        "how it is moved: 'full-matrix', Adam's step turned by the matrix of the passage's last "
        "gradients; 'nadam', Adam whose mean gradient is taken a move ahead; 'adam'; 'adamw'",
    )
    lr: float = documented(
        0.1,
        "learning rate; beside lr_large, that of vectors which an encoder put near where they have "
        "to be, in proportion to their size (RMS) where that is more than 1; 0: as progressive "
        "cramming was run, 0.5 for GPT-NeoX (Pythia), 0.1 for others",
    )
    lr_large: float = documented(
        12.8,
        "learning rate, and minimum size (RMS), of all other vectors, and of those once their "
        "passage has been stuck: a large vector gets there sooner and holds more; 0: lr for all",
    )
    warmup: int = documented(0, "moves over which the learning rate rises from 0")
    decay: int = documented(
        0, "moves after which it has fallen, along a cosine, to lr_end; 0: it stays"
    )
    lr_end: float = documented(1e-3, "learning rate after `decay` moves")
    beta1: float = documented(0.95, "decay of the mean gradient")
    beta1_rise: float = documented(
        0.4,
        "after t moves the mean gradient's decay is 1 - 1 / (1 + 0.8 t^this), until it is beta1: "
        "the first moves follow their own gradient; 0: beta1 from the first move",
    )
    beta2: float = documented(0.7, "decay of the mean squared gradient")
    weight_decay: float = documented(0.0, "decoupled weight decay (adamw)")
    start: str = documented(
        "auto",
        "where vectors begin; 'auto': the model's one-pass encoder for such vectors if it has one, "
        "else noise, or for 'use' the last tokens of the passage",
    )
    start_rule: StartRuleName = documented(
        "vectors",
        "what follows the vectors: nothing, the model's BOS, the passage's first token; 'paper': "
        "BOS if the tokenizer adds one, else the first token",
    )
    front: FrontName = documented(
        "none",
        "what stands in front of the vectors: 'none', as in the paper; 'bos', the model's BOS, as "
        "in front of a text; 'auto': BOS, where the model has one and vectors are inputs",
    )
    trigger: str = documented(
        "bos",
        "what follows the vectors under the start rule 'bos', in front of the passage: 'bos', the "
        "text of another token, its number as '#17', a file of 'memvec trigger train', or 'auto': "
        "the one in the model's folder, if there is one (for inputs), else BOS",
    )
    compute: ComputeName = documented(
        "auto",
        "what steps are computed in: 'model', the model's own dtype; 'bfloat16', a rounded copy of "
        "its weights; 'auto': bfloat16 for float32 models on a CPU that has products of it. What "
        "is exact is decided in the model's own dtype",
    )
    steps: int = documented(1500, "maximum number of optimiser steps for a passage")
    patience: int = documented(300, "steps without progress after which a passage is given up")
    if_not_exact: NotExactName = documented(
        "raise-margin",
        "a passage that has its margins and does not decode is crammed on at twice the margin; "
        "'stop': it ends with the vectors that it has",
    )
    budget: int = documented(
        0, "maximum forward-backward tokens for a passage, checked after each step; 0: no limit"
    )
    corrections: int = documented(
        0, "tokens of a passage that may be listed in the file where the vectors miss them"
    )
    seed: int = documented(0, "seed; each passage adds its own from its token ids")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = converted(item.name, getattr(self, item.name), type(item.default))
            object.__setattr__(self, item.name, value)
        for name in (*REGISTERED, *CHOICES):
            value, allowed = getattr(self, name), choices(name)
            if value not in allowed:
                raise MemvecError(
                    f"the recipe's {name} cannot be '{value}': it is one of {', '.join(allowed)}."
                )
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if not value >= minimum or value == float("inf"):
                raise MemvecError(f"the recipe's {name} must be at least {minimum:g}, not {value}.")
        for name, unset in FOR_USE.items():
            if self.term != "use" and getattr(self, name) != unset:
                raise MemvecError(f"{name} {getattr(self, name)} is for use only: add --usable.")
        if abs(self.seed) >= 2**63:
            raise MemvecError(f"the recipe's seed must fit 64 bits; {self.seed} does not.")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise MemvecError(f"the recipe's {name} must be in [0, 1), not {value}.")

    @classmethod
    def of(cls, preset: str = "default", /, **changes: Any) -> Recipe:
        """A preset by name, with fields changed. Raises MemvecError for unknown names or values."""
        base: Recipe = registry.get("preset", preset)()
        kinds = {item.name: type(item.default) for item in fields(cls)}
        named = {name.replace("-", "_"): value for name, value in changes.items()}
        for name in [name for name in named if name not in kinds]:
            raise MemvecError(f"a recipe has no '{name}': {did_you_mean(name, kinds)}")
        return replace(base, **{n: converted(n, v, kinds[n]) for n, v in named.items()})

    def in_logits(self, spread: float) -> Recipe:
        """The same recipe for a model whose logits spread so far, with everything in logits."""
        if self.unit == "logits":
            return self
        return replace(
            self,
            unit="logits",
            temperature=self.temperature * spread,
            margin=self.margin * spread,
        )

    def for_family(self, family: str) -> Recipe:
        """The same recipe with its rate for models of this `model_type`, where lr is 0."""
        return self if self.lr else replace(self, lr=0.5 if family == "gpt_neox" else 0.1)

    def record(self) -> dict[str, Any]:
        """As a plain dictionary, for files and stores; without what it has no use for.

        Without space, front and what is for use only, it is as it was before they were fields.
        """
        absent = {k for k, v in (FOR_USE | {"front": "none"}).items() if getattr(self, k) == v}
        absent |= {"space", "layer"} if self.space == "inputs" else set()
        return {name: value for name, value in asdict(self).items() if name not in absent}
