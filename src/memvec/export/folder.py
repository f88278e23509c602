"""The folder of an export: one item per passage and a manifest, certified before it gets its name.

    manifest.json     the items, how many tokens to generate for each, how passages make up
                      documents, the certificate, and the hashes of the other files
    passage-0000...   the passages in order, each in the target's own format
    decode.py ...     programs of the target, if it has any, that run without memvec

Every item is written, read back as the target's loader reads it, and decoded freely at batch size
1. Only then does the folder get its name, so every existing folder is certified and no export that
is not exact remains on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memvec.companions.around import in_full
from memvec.errors import MemvecError, NotExactError, check_type
from memvec.export.target import (
    Item,
    Target,
    ids_decoded,
    refuse_other_weights,
    stock_attention,
    target_of,
    written,
)
from memvec.header import PassageRecord
from memvec.machine import environment, plain_torch
from memvec.model.fingerprint import Fingerprint
from memvec.passages.passage import ids_hash
from memvec.vectors import MemVectors
from memvec.writing import path_of, pretty_json, read_json, temporary_name

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

MANIFEST = "manifest.json"
FORMAT = "memvec-export"
MAX_NAMED = 5  # passages that an error message names


@plain_torch()
def export(
    lm: FrozenLM,
    mem: MemVectors,
    target: Target | str,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write `mem` for decoding mode in a target's format and certify it; returns the manifest.

    `target` is the name of a target (`memvec.export.names()`), or a Target. `lm` must be in the
    dtype in which the target runs it (`target.dtype` if it has one). Raises MemvecError for another
    model, an existing folder (`force` replaces an earlier export only), a model that the target
    does not support, or vectors that it cannot decode (one-step, in a space, with corrections);
    NotExactError, which names the passages, if they do not decode exactly in the target's dtype. No
    files remain after an error.
    """
    target = target_of(target)
    check_type("mem", mem, MemVectors, "MemVectors.load")
    output = path_of(folder)
    check(mem, lm, target, output, force)
    items = [_item(mem, i, lm) for i in range(len(mem.passages))]
    digits = max(4, len(str(len(items) - 1)))
    names = [f"passage-{i:0{digits}}{target.suffix}" for i in range(len(items))]

    def fill(aside: Path) -> dict[str, Any]:
        for name, item in zip(names, items, strict=True):
            written(target, aside / name, item, lm)
        with stock_attention(lm):
            _certify(mem, lm, target, [aside / name for name in names], items)
            return _manifest(mem, lm, target, names, items)

    return write_folder(output, fill, target.programs)


def write_folder(
    output: Path, fill: Callable[[Path], dict[str, Any]], programs: dict[str, Path]
) -> dict[str, Any]:
    """Write an export into a temporary folder, then rename it to `output`; returns the manifest.

    `fill` writes the items into the folder that it gets and returns the manifest, to which the
    hashes are added; `programs` are files to copy, by their names there. Raises MemvecError if
    writing fails. No files remain after an error.
    """
    aside = temporary_name(output)
    try:
        aside.mkdir()
        manifest = fill(aside)
        manifest["files"] = _hashes(aside)
        whole = json.dumps(manifest, sort_keys=True)  # to detect changes of the manifest
        manifest["sha256"] = hashlib.sha256(whole.encode()).hexdigest()
        (aside / MANIFEST).write_text(pretty_json(manifest) + "\n", encoding="utf-8")
        for name, program in programs.items():
            shutil.copyfile(program, aside / name)
        _put_in_place(aside, output)
    except OSError as error:
        raise MemvecError(f"{output} cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _put_in_place(finished: Path, output: Path) -> None:
    """Rename a finished folder to `output`, then delete the earlier export there.

    Between the two renames the earlier export has a name that `_restore` knows.
    """
    if not output.exists():
        finished.replace(output)
        return
    earlier = _name_of_earlier(output)
    shutil.rmtree(earlier, ignore_errors=True)  # a run was killed while it deleted it
    try:
        output.replace(earlier)
        finished.replace(output)
    except BaseException:
        if not output.exists():
            earlier.replace(output)
        raise
    finally:
        if output.exists():  # else the earlier one is the only one
            shutil.rmtree(earlier, ignore_errors=True)


def _name_of_earlier(output: Path) -> Path:
    """The name of an earlier export while another one takes its place."""
    return output.with_name(f".{output.name}.earlier")


def _restore(output: Path) -> None:
    """Rename an earlier export back to `output`, if a run was killed between two renames."""
    earlier = _name_of_earlier(output)
    if not output.exists() and _is_export(earlier):
        with contextlib.suppress(OSError):  # nothing can be written there, which is said later
            earlier.replace(output)


def check(mem: MemVectors, lm: FrozenLM, target: Target, output: Path, force: bool) -> None:
    """Raise MemvecError if vectors, model or folder do not suit the target."""
    if mem.header.layout != "prefix":
        raise MemvecError(
            f"one-step vectors are read in one forward pass, which no export is for: "
            f"{target.name} generates token by token."
        )
    if mem.header.space is not None:
        raise MemvecError(
            f"vectors in the space '{mem.header.space.name}' are no inputs, which is what "
            f"{target.name} takes: cram the text in the space 'inputs'."
        )
    mem.check_model(lm, force=True)  # the width
    if not Fingerprint.of_record(mem.header.model).matches(lm.fingerprint):
        raise MemvecError(
            f"these vectors were made for other weights than those of {lm.name}, and an export is "
            f"certified for the weights that the file names: load {mem.header.model['name']}."
        )
    refuse_other_weights(lm, target.name)
    dtype = str(lm.dtype).removeprefix("torch.")
    if target.dtype not in (None, dtype):
        raise MemvecError(
            f"{target.name} takes vectors in {target.dtype} and {lm.name} is loaded in {dtype}: "
            f"load it in {target.dtype}."
        )
    target.refuse(lm)
    check_place(output, force)


def check_place(output: str | os.PathLike[str], force: bool) -> None:
    """Raise MemvecError if an export cannot be written to `output`.

    It needs no model, so that it can run before one is loaded. An earlier export that a killed run
    left without its name gets it back.
    """
    output = path_of(output)
    if not output.parent.is_dir():
        raise MemvecError(f"there is no folder {output.parent} to write {output.name} in.")
    _restore(output)
    if not output.exists():
        return
    if not _is_export(output):
        raise MemvecError(f"{output} is not an earlier export: name another folder.")
    if not force:
        raise MemvecError(f"{output} exists: use force=True to replace it, or name another.")


def _is_export(folder: Path) -> bool:
    """True for a folder of an export: other programs write files named manifest.json, too."""
    try:
        manifest = read_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _item(mem: MemVectors, i: int, lm: FrozenLM) -> Item:
    record, rule = mem.passages[i], mem.header.start_rule
    if record.corrections:
        raise MemvecError(
            f"passage {i} has corrections, which only 'memvec decode' puts in their places: cram "
            "it without corrections."
        )
    view, given = mem.view(lm), tuple[int, ...]()
    vectors = in_full(view, mem.vectors[i]) if view.front or mem.soft else mem.vectors[i]
    if rule == "bos" and not mem.soft:
        given = view.trigger
        if not given:
            raise MemvecError(f"{lm.name} has no BOS token, and these vectors need one.")
    elif rule == "first-token" and record.first is not None:
        given = (record.first,)
    return Item(vectors, given, record.tokens - len(_given_of_passage(record)))


def _given_of_passage(record: PassageRecord) -> list[int]:
    """Token ids of the passage that the input contains, so that they are not generated."""
    return [] if record.first is None else [record.first]


def _certify(
    mem: MemVectors, lm: FrozenLM, target: Target, paths: list[Path], items: list[Item]
) -> None:
    wrong = []
    for i, (path, item, record) in enumerate(zip(paths, items, mem.passages, strict=True)):
        ids = _given_of_passage(record)
        if item.new_tokens:
            ids = ids + ids_decoded(target, path, item, lm)
        if ids_hash(ids) != record.sha256:
            wrong.append(f"passage {i} ({record.tokens} tokens)")
    if not wrong:
        return
    more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    dtype = str(lm.dtype).removeprefix("torch.")
    raise NotExactError(
        f"{len(wrong)} of {len(paths)} passages do not decode exactly in {dtype} as "
        f"{target.name} reads them: {', '.join(wrong[:MAX_NAMED])}{more}; cram for it with "
        f"the dtype and storage '{dtype}', or with a larger margin."
    )


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, with which `decode.py` detects damaged ones."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _manifest(
    mem: MemVectors, lm: FrozenLM, target: Target, names: list[str], items: list[Item]
) -> dict[str, Any]:
    model = lm.description()
    versions = environment()
    return {
        **common_facts(mem, lm, target),
        "mode": "decoding",
        "trigger_vectors": mem.header.soft_trigger,  # after the passage's vectors
        "passages": [
            {
                "file": name,
                "given": list(item.given),
                "starts_with": _given_of_passage(record),
                "new_tokens": item.new_tokens,
                "sha256": record.sha256,
            }
            for name, item, record in zip(names, items, mem.passages, strict=True)
        ],
        "certificate": {
            "exact": True,
            "decoded_by": target.certified_by(),
            "decoded_in": model["dtype"],
            "device": model["device"],
            "attention": model["attention"],
            "batch": 1,
            **{k: versions[k] for k in ("memvec", "torch", "transformers", "date")},
        },
    }


def common_facts(mem: MemVectors, lm: FrozenLM, target: Target) -> dict[str, Any]:
    """The entries on model, vectors and documents that every manifest has."""
    model = lm.description()
    return {
        "format": FORMAT,
        "version": 1,
        "target": target.name,
        "model": {k: model[k] for k in ("name", "revision", "config", "weights")},
        "dtype": model["dtype"],
        "vectors_per_passage": mem.vectors.shape[1],
        "front_vectors": len(mem.view(lm).front),  # before the passage's vectors, in each item
        "width": mem.vectors.shape[2],
        "context_scale": mem.header.context_scale,  # factor of the vectors in context mode
        "start_rule": mem.header.start_rule,
        "documents": [
            d.model_dump(mode="json", include={"name", "sha256", "size", "encoding", "edits"})
            | {"passages": d.passages}
            for d in mem.header.documents
        ],
    }
