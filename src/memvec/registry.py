"""The registry of everything that can be chosen by name, and `register` to add to it.

    from memvec import register

    @register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe):
        ...

KINDS lists the kinds of choices. Recipes, study specs, help texts and "did you mean" hints use this
registry. Built-in choices are listed as `module:attribute` and imported when they are used, so a
list of names needs no imports. A package that declares the entry-point group `memvec.plugins` is
imported before the names of a kind are listed:

    [project.entry-points."memvec.plugins"]
    mine = "my_package.objectives"
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from memvec import part_checks, plugins
from memvec.errors import MemvecError, did_you_mean

Choice = TypeVar("Choice")

KINDS = {
    "preset": "() -> Recipe: every choice of how passages are crammed, under one name",
    "objective": "(logits, ids, temperature, recipe) -> loss of each position",
    "term": "a class made from (lm, module, recipe, K, start_rule): a second loss on the vectors",
    "queries": "(lm, ids, recipe) -> token ids that the model reads after the vectors",
    "schedule": "a class made from (recipe, K): which positions count, and how soft the loss is",
    "coordinates": "a class made from (recipe, K, lm): parameters to [mem] vectors",
    "layout": "a class made from (): how a model reads [mem] vectors",
    "space": "(lm, options) -> how the model reads the numbers of a vector, and how many there are",
    "optimizer": "a class made from (recipe): one step of stacked parameters",
    "start": "(lm, ids, K, recipe) -> first vectors",
    "source": "a pydantic model that yields passages for a study",
    "protocol": "what a study measures of each cell, with its table and its figure",
    "export": "what writes vectors for other software, and reads them as it does",
    "encoder": "what reads a one-pass encoder from a file's tensors and metadata",
}

# kind -> name -> module:attribute
BUILT_IN: dict[str, dict[str, str]] = {
    "preset": {
        "default": "memvec.cramming.recipe:Recipe",
        "capacity": "memvec.arms.capacity:capacity",
        "usable": "memvec.usable.preset:usable",
        "usable-quick": "memvec.usable.preset:usable_quick",
        "usable-long": "memvec.usable.preset:usable_long",
        "paper": "memvec.arms.presets:paper",
        "one-step": "memvec.arms.presets:one_step",
        "progressive": "memvec.arms.presets:progressive",
        "temperature": "memvec.arms.presets:temperature",
        "low-dim": "memvec.arms.presets:low_dim",
        "margin-ce": "memvec.arms.presets:margin_ce",
        "margin": "memvec.arms.presets:margin",
        "alignment": "memvec.arms.presets:alignment",
        "geometric": "memvec.arms.presets:geometric",
        "prefix": "memvec.spaces.presets:prefix",
        "prefix-layer": "memvec.spaces.presets:prefix_layer",
    },
    "objective": {
        "cross-entropy": "memvec.cramming.objectives:CrossEntropy",
        "margin": "memvec.arms.objectives:margin",
        "deficit": "memvec.arms.objectives:Deficit",
    },
    "term": {
        "none": "memvec.cramming.terms:NoTerm",
        "use": "memvec.usable.term:Use",
        "alignment": "memvec.arms.alignment:Alignment",
    },
    "queries": {
        "continuations": "memvec.usable.queries:continuations",
        "samples": "memvec.usable.queries:samples",
    },
    "schedule": {
        "growing": "memvec.cramming.schedules:Growing",
        "geometric": "memvec.arms.geometric:Geometric",
        "whole": "memvec.cramming.schedules:Whole",
    },
    "coordinates": {
        "direct": "memvec.cramming.coordinates:Direct",
        "principal": "memvec.arms.principal:Principal",
        "whitened": "memvec.arms.principal:Whitened",
        "low-dim": "memvec.arms.low_dim:LowDim",
    },
    "layout": {
        "prefix": "memvec.model.reading:Reading",
        "one-step": "memvec.arms.one_step:OneStepReading",
        "one-step-shared": "memvec.arms.one_step:OneStepSharedM",
    },
    "space": {
        "inputs": "memvec.model.reading:in_front",
        "prefix": "memvec.spaces.keys_values:KeysValues",
        "prefix-layer": "memvec.spaces.keys_values:OneLayer",
        "shared-basis": "memvec.spaces.shared_basis:SharedBasis",
    },
    "optimizer": {
        "nadam": "memvec.cramming.optimizers:NAdam",
        "adam": "memvec.cramming.optimizers:Adam",
        "adamw": "memvec.cramming.optimizers:AdamW",
        "full-matrix": "memvec.arms.full_matrix:FullMatrix",
    },
    "start": {
        "noise": "memvec.cramming.starts:noise",
        "last-tokens": "memvec.usable.starts:last_tokens",
        "embeddings": "memvec.arms.starts:embeddings",
        "uniform": "memvec.arms.starts:uniform",
        "linear": "memvec.arms.low_dim:linear",
        "normal": "memvec.arms.starts:normal",
        "saved": "memvec.arms.saved:saved",
    },
    "source": {
        "files": "memvec.lab.sources.files:Files",
        "hub": "memvec.lab.sources.hub:Hub",
        "pg19": "memvec.lab.sources.hub:Pg19",
        "fanfics": "memvec.lab.sources.hub:Fanfics",
        "random-words": "memvec.lab.sources.random_words:RandomWords",
        "random-tokens": "memvec.lab.sources.random_tokens:RandomTokens",
        "sampled": "memvec.lab.sources.sampled:Sampled",
        "book": "memvec.lab.sources.book:WholeBook",
        "sentences": "memvec.lab.sources.sentences:Sentences",
    },
    "protocol": {
        "paper": "memvec.lab.protocols.paper:Paper",
        "exact": "memvec.lab.protocols.exact:Exact",
        "vectors": "memvec.lab.protocols.vectors:Vectors",
        "transfer": "memvec.lab.protocols.transfer:TransferProtocol",
        "recurrent": "memvec.lab.protocols.recurrent:Recurrent",
        "checkpoints": "memvec.lab.protocols.checkpoints:Checkpoints",
        "one-step": "memvec.lab.protocols.one_step:OneStep",
        "one-step-arrangements": ("memvec.lab.protocols.one_step_arrangements:OneStepArrangements"),
        "one-step-groups": "memvec.lab.protocols.one_step_groups:OneStepGroups",
        "book": "memvec.lab.protocols.book:Book",
        "threshold": "memvec.lab.protocols.threshold:Threshold",
        "context": "memvec.lab.protocols.context:Context",
        "copy": "memvec.lab.protocols.copy:Copy",
        "upper-bound": "memvec.lab.protocols.upper_bound:UpperBound",
        "geometry": "memvec.lab.protocols.geometry:Geometry",
        "usable": "memvec.lab.protocols.usable:Usable",
        "spaces": "memvec.lab.protocols.spaces:Spaces",
        "reading": "memvec.lab.protocols.reading:ReadingProtocol",
        "sentences": "memvec.lab.protocols.sentences:Sentences",
    },
    "export": {
        "transformers": "memvec.export.transformers:Transformers",
        "vllm": "memvec.export.vllm:Vllm",
        "sglang": "memvec.export.sglang:Sglang",
        "peft": "memvec.export.peft:Peft",
        "llama.cpp": "memvec.export.llama_cpp:LlamaCpp",
        "mlx": "memvec.export.mlx:Mlx",
        "npy": "memvec.export.npy:Npy",
    },
    "encoder": {
        "summary": "memvec.encoders.summary:read",
        "slots": "memvec.encoders.slots:read",
        "recurrent": "memvec.encoders.recurrent:read",
        "usable": "memvec.encoders.usable:read",
        "adapted": "memvec.encoders.adapted:read",
    },
}
_ADDED: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[Choice], Choice]:
    """Decorator that adds a function or class under a name, and returns it unchanged.

    Raises MemvecError for an unknown kind, for a name that has brackets or is taken, and for a
    function or class that cannot be called with the arguments that KINDS shows.
    """
    _check_kind(kind)
    plugins.check_name(kind, name)

    def add(choice: Choice) -> Choice:
        known = _ADDED[kind].get(name, choice)
        # A reloaded module registers the same function or class again, which is allowed.
        if name in BUILT_IN[kind] or _place(known) != _place(choice):
            raise MemvecError(
                f"the name '{name}' is taken by another {kind}: register yours under another one."
            )
        plugins.check_arguments(kind, name, choice, KINDS[kind])
        _ADDED[kind][name] = choice
        return choice

    return add


def names(kind: str) -> list[str]:
    """All names of a kind, the built-in ones first.

    Raises MemvecError for an unknown kind, and if a plug-in cannot be imported.
    """
    _check_kind(kind)
    plugins.load_plugins()
    return [*BUILT_IN[kind], *_ADDED[kind]]


def get(kind: str, name: str) -> Any:
    """The function or class of a name; arguments in the name are bound to it (memvec.plugins).

    Raises MemvecError for an unknown kind, name or argument (with the nearest known one), and if a
    plug-in cannot be imported.
    """
    if "(" in (name := str(name)) and not name.startswith("("):
        name, arguments = plugins.split(name)
        return plugins.bound(kind, name, get(kind, name), arguments)
    if name not in names(kind):
        raise MemvecError(f"unknown {kind} '{name}': {plugins.known(name, names(kind))}")
    if name in _ADDED[kind]:
        return _ADDED[kind][name]
    module, _, attribute = BUILT_IN[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def spelled(kind: str, name: str) -> str:
    """The canonical spelling of a name with arguments. Raises MemvecError as `get` does."""
    get(kind, name)
    return plugins.spelled(*plugins.split(name))


def made(kind: str, name: str, *arguments: Any) -> Any:
    """What a name makes from these arguments, checked as `guarded` does."""
    return guarded(kind, name, get(kind, name)(*arguments))


def guarded(kind: str, name: str, part: Any) -> Any:
    """`part`, which `name` made; a registered one is checked wherever it is used.

    Raises MemvecError, then or later, if it is not what its kind has to be (memvec.part_checks).
    """
    added = plugins.plain(name) in _ADDED[kind]
    return part_checks.guarded(kind, plugins.plain(name), part) if added else part


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise MemvecError(f"unknown kind '{kind}': {did_you_mean(kind, KINDS)}")


def _place(choice: Any) -> tuple[str, str]:
    return getattr(choice, "__module__", ""), getattr(choice, "__qualname__", repr(choice))
