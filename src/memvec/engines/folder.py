"""The folder of a model's weights, as an engine reads it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.hub import cached_file

from memvec.errors import MemvecError
from memvec.loading import POCKET
from memvec.writing import path_of, read_json

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

INDEX = "model.safetensors.index.json"


def folder_of(lm: FrozenLM) -> Path:
    """The folder that the model was loaded from: the built-in one, a path, or the cache.

    Raises MemvecError if there is none with a `config.json`.
    """
    folder = POCKET if lm.name == "pocket" else path_of(lm.name)
    if not (folder / "config.json").is_file():
        with contextlib.suppress(OSError, ValueError):
            config = cached_file(
                lm.name, "config.json", revision=lm.revision, local_files_only=True
            )
            folder = Path(config).parent if config else folder
    if not (folder / "config.json").is_file():
        raise MemvecError(
            f"an engine reads a model's folder, and {lm.name} is none: give it with model=FOLDER."
        )
    return folder


def config_of(model: Path) -> dict[str, Any]:
    """The text part of a model's `config.json`. Raises MemvecError if there is none."""
    try:
        config = dict(read_json((model / "config.json").read_text(encoding="utf-8")))
        return dict(config.get("text_config") or config)
    except (OSError, ValueError, TypeError):
        raise MemvecError(f"{model} is no folder of a model: it has no config.json.") from None


@contextlib.contextmanager
def model_alone(model: Path) -> Iterator[Path]:
    """The folder without weights that are not the model's: links in a folder made for it.

    vLLM loads every `.safetensors` file there is, and a folder may hold other weights than the
    model's (the built-in model's has those of its encoder).
    """
    weights = _weights_of(model)
    if not model.is_dir() or weights >= {path.name for path in model.glob("*.safetensors")}:
        yield model
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in model.iterdir():
            if path.is_file() and (path.suffix != ".safetensors" or path.name in weights):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)


def _weights_of(model: Path) -> set[str]:
    """Names of the files with the model's own weights."""
    if (model / INDEX).is_file():
        index = json.loads((model / INDEX).read_text(encoding="utf-8"))
        return set(index["weight_map"].values())
    return {"model.safetensors"}
