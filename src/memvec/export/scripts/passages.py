"""The passages of this folder, for its `decode.py`: what is there, and whether it came back."""

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def checked_manifest() -> dict[str, Any]:
    """What the folder holds. Ends the program if a file of it is not the one that was written."""
    try:
        manifest: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
        content = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
        if hashlib.sha256(content.encode()).hexdigest() != manifest["sha256"]:
            raise ValueError
        written: dict[str, str] = manifest["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        sys.exit(f"{FOLDER} has no whole manifest.json: export it again.")
    for name, digest in written.items():
        path = FOLDER / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            sys.exit(f"{name} of this folder is missing, cut short or changed: export it again.")
    return manifest


MANIFEST = checked_manifest()


def model_folder() -> Path:
    """The folder that the command names. Ends the program if its model reads other vectors."""
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "MODEL_FOLDER")
    if not (folder / "config.json").is_file():
        sys.exit(f"{folder} is no folder of a model: it has no config.json.")
    config = config_of(folder)
    width = config.get("word_embed_proj_dim") or config.get("hidden_size") or config.get("n_embd")
    refuse_width(str(folder), width)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """The config of a model's folder, or its text model's. Ends the program if it is none."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("text_config") or config
    except (OSError, ValueError, AttributeError):
        sys.exit(f"{folder / 'config.json'} is not a model's config.")


def positions_of(folder: Path) -> int:
    """How many tokens the model in a folder reads; very many where its config does not say."""
    config = config_of(folder)
    named = ("max_position_embeddings", "n_positions", "max_seq_len")
    return min((config[name] for name in named if config.get(name)), default=2**31)


def refuse_width(model: str, width: int | None) -> None:
    """End the program if a model reads vectors of another width than these have."""
    if width is not None and width != MANIFEST["width"]:
        sys.exit(f"{model} reads vectors of {width} numbers, and these have {MANIFEST['width']}.")


def decode(after: Callable[[Path, dict[str, Any]], list[int]]) -> int:
    """Print the token ids of every passage; 0 if all have the hash of what was crammed, else 3.

    `after` gives the new tokens of an item and its entry in the manifest.
    """
    wrong = 0
    for passage in MANIFEST["passages"]:
        new = after(FOLDER / passage["file"], passage) if passage["new_tokens"] else []
        ids = passage["starts_with"] + new
        print(ids, flush=True)
        digest = hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()
        if digest != passage["sha256"]:
            print(f"{passage['file']} did not come back.", file=sys.stderr)
            wrong += 1
    return 3 if wrong else 0
