"""Names of a study's models in tables, figures and sentences."""

from __future__ import annotations

from collections.abc import Iterable

from memvec.lab.study.spec import ModelKey


def model_names(keys: Iterable[ModelKey]) -> dict[ModelKey, str]:
    """A name for each model: its last part, what `distinct_names` adds, and how it is loaded."""
    keys = list(dict.fromkeys(keys))
    names, words = distinct_names(key.name for key in keys), loading_words(keys)
    return {key: ", ".join(filter(None, [names[key.name], words[key]])) for key in keys}


def distinct_names(models: Iterable[str]) -> dict[str, str]:
    """A name for each model: its last part, with folders in front where two would be alike."""
    parts = {model: model.rstrip("/").split("/") for model in models}
    names = {}
    for model, own in parts.items():
        others = [other for name, other in parts.items() if name != model]
        lengths = range(1, len(own) + 1)
        apart = (n for n in lengths if all(other[-n:] != own[-n:] for other in others))
        names[model] = "/".join(own[-next(apart, len(own)) :])
    return names


def loading_words(keys: Iterable[ModelKey]) -> dict[ModelKey, str]:
    """How each model is loaded, in words, such as 'bfloat16, 8bit'; '' if its name says enough.

    Bits of quantized weights are always told. Revision and dtype are told of models that are in the
    study with several of them.
    """
    keys = list(dict.fromkeys(keys))
    words = {}
    for key in keys:
        alike = [other for other in keys if other.name == key.name]
        several_revisions = len({other.revision for other in alike}) > 1
        several_dtypes = len({other.dtype for other in alike}) > 1
        told = [
            (key.revision or "main") if several_revisions else None,
            key.dtype if several_dtypes else None,
            key.quantize,
        ]
        words[key] = ", ".join(word for word in told if word)
    return words
