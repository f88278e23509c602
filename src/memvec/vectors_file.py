"""Read and write the file of [mem] vectors: safetensors with a header and a digest.

Reading checks the names and shapes of tensors against the header, the digest of header and tensors,
and that every number is finite.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from memvec.errors import MemvecError, first_problem
from memvec.header import Header
from memvec.model.reading import reading_named
from memvec.storage import STORAGES
from memvec.writing import copied_tensors, path_of, write_atomically


def existing_path(path: str | os.PathLike[str]) -> Path:
    """The path of an existing file; the suffix `.safetensors` may be left out.

    Raises MemvecError if there is no such file, if it is a folder, or if its name is not UTF-8.
    """
    file = path_of(path)
    if not str(file).isascii() and os.fsencode(file).decode("utf-8", "replace") != str(file):
        raise MemvecError(f"{os.fsencode(file)!r} is no name in UTF-8: rename the file.")
    if file.is_dir():
        raise MemvecError(f"{file} is a directory, not a file of [mem] vectors.")
    for candidate in (file, file.with_name(file.name + ".safetensors")):
        if candidate.exists():
            return candidate
    raise MemvecError(f"there is no file {file}.")


def write_file(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a header and tensors atomically: those of a storage, and soft tokens if there are any.

    Raises MemvecError for tensors that `read_file` would refuse (numbers that are not finite, or a
    number of rows that does not fit the header), and if the file cannot be written.
    """
    first = tensors["codes" if header.packing else "vectors"]
    rows = reading_named(header.layout).row_count(len(header.passages))
    if len(first) != rows or not all(bool(t.float().isfinite().all()) for t in tensors.values()):
        raise MemvecError(f"{path} is not written: its vectors were changed or are not finite.")
    text = header.model_dump_json()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = to_safetensors(tensors, {"memvec": text, "sha256": digest_of(text, tensors)})
    write_atomically(path, data)


def read_file(file: Path) -> tuple[Header, Tensor, dict[str, Tensor]]:
    """Read a file: its header, its rows (R, k, D) as numbers, and its soft tokens by name.

    Raises MemvecError for a file that is truncated, foreign, damaged or changed.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            held = set(opened.keys())
            names = held - {"trigger", "front"}
            if "memvec" not in metadata or names not in ({"vectors"}, {"codes", "scales"}):
                raise MemvecError(f"{file} is a safetensors file but not one of memvec's.")
            header = Header.model_validate_json(metadata["memvec"])
            soft = copied_tensors(opened, sorted(held - names))
            if (header.packing is None) != (names == {"vectors"}):
                raise MemvecError(f"{file} claims the packing {header.packing}, but holds another.")
            first = "vectors" if header.packing is None else "codes"
            shape = opened.get_slice(first).get_shape()
            rows = reading_named(header.layout).row_count(len(header.passages))
            if len(shape) != 3 or shape[0] != rows or 0 in shape:
                raise MemvecError(
                    f"{file} claims {len(header.passages)} passages and holds vectors of shape "
                    f"{tuple(shape)}: it is damaged."
                )
            tensors = copied_tensors(opened, sorted(names))
    except ValidationError as error:
        wrong = first_problem(error)
        raise MemvecError(f"{file} has a damaged header, or a later memvec's ({wrong}).") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise MemvecError(
            f"{file} is not a file of [mem] vectors, or is truncated: {error}."
        ) from None
    dtype = str(tensors[first].dtype).removeprefix("torch.")
    storage = STORAGES.get(header.packing or dtype)
    if storage is None:
        raise MemvecError(f"{file} stores {dtype}, which memvec does not write.")
    if digest_of(metadata["memvec"], tensors | soft) != metadata.get("sha256"):
        raise MemvecError(f"{file} was changed after it was written: its digest does not match.")
    try:
        vectors = storage.unpack(tensors)
    except ValueError as error:
        raise MemvecError(f"{file} {error}.") from None
    if not all(bool(torch.isfinite(t.float()).all()) for t in (vectors, *soft.values())):
        raise MemvecError(f"{file} holds numbers that are not finite.")
    return header, vectors, soft


def digest_of(header: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 (hex) of a header's JSON text and of tensors by name.

    It covers the name, dtype, shape and bytes of each tensor.
    """
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        flat = tensors[name].contiguous().flatten()
        digest.update(f"{name} {flat.dtype} {list(tensors[name].shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
