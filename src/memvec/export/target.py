"""The base class of export targets: writes one passage for other software and reads it back.

A target is one file with a subclass that writes a passage and reads it back *as the target's own
loader does*, dtype and layout included. The inputs that were read back are certified, so an export
that changed a bit of them is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from memvec import __version__, part_checks, registry
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, did_you_mean
from memvec.model.precision import ATTENTION

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

SCRIPTS = Path(__file__).parent / "scripts"


def decoder(script: str, *beside: str) -> dict[str, Path]:
    """The programs for an export folder, with which it can be decoded without memvec.

    `beside` are scripts that the first one imports, besides `passages.py`.
    """
    return {"decode.py": SCRIPTS / script} | {n: SCRIPTS / n for n in ("passages.py", *beside)}


def refuse_other_weights(lm: FrozenLM, reader: str) -> None:
    """Raise MemvecError for a quantized or mixed-precision model, which `reader` runs otherwise."""
    if lm.quantize or lm.autocast:
        how = f"quantized to {lm.quantize}" if lm.quantize else "in mixed precision"
        raise MemvecError(
            f"{lm.name} is {how} here, and {reader} reads its folder as it is: cram with the model "
            "in a dtype that it is run in, without quantization."
        )


@contextlib.contextmanager
def stock_attention(lm: FrozenLM) -> Iterator[None]:
    """Context manager: the model uses transformers' attention in place of memvec's own.

    A certificate for other software has to be measured with the attention that it uses.
    """
    model: Any = lm.model
    if getattr(lm.config, "_attn_implementation", None) != ATTENTION:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


@dataclass(frozen=True)
class Item:
    """One passage to export.

    `vectors` (K, D) as stored, with the front before them and a crammed trigger after them if there
    are any (K counts them too); `given`: token ids that follow in the input (BOS, the passage's
    first token, or none); `new_tokens`: number of tokens to generate.
    """

    vectors: Float[Tensor, "K D"]
    given: tuple[int, ...]
    new_tokens: int


class Target:
    """Base class of export targets; built with the name under which it is registered.

    `dtype` is the only dtype that the target accepts, None for the model's own. `suffix` ends the
    name of each passage's file ('' for a folder). `description` is one line for the command line.
    `programs` are files to copy into the folder, by their names there (see `decoder`). `argument`
    describes the argument of its `decode.py`, '' without one.
    """

    description: ClassVar[str]
    dtype: ClassVar[str | None] = None
    suffix: ClassVar[str]
    programs: ClassVar[dict[str, Path]] = {}
    argument: ClassVar[str] = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuse(self, lm: FrozenLM) -> None:
        """Raise MemvecError if the target cannot take vectors of this model."""

    def write(self, path: Path, item: Item, lm: FrozenLM) -> None:
        """Write one passage to `path` (a file, or a folder that does not exist yet)."""
        raise MemvecError(f"the export '{self.name}' has no method write.")

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        """The inputs (N, D) that the target passes to the model, read from `path`."""
        raise MemvecError(f"the export '{self.name}' has no method read.")

    def decode(self, path: Path, item: Item, lm: FrozenLM) -> list[int]:
        """Token ids from greedy decoding of the written item, at batch size 1.

        By default memvec's decoder on the inputs of `read`; a target may run its own software, and
        raises MemvecError if that cannot generate with the model.
        """
        inputs = inputs_read(self, path, item, lm).to(lm.device)
        return decode_ids(lm, inputs[None], [item.new_tokens])[0]

    def certified_by(self) -> str:
        """The name and version of the program that `decode` runs, for the certificate."""
        return f"memvec {__version__}"


def written(target: Target, path: Path, item: Item, lm: FrozenLM) -> None:
    """Write an item. Raises MemvecError if there is nothing at `path` afterwards."""
    target.write(path, item, lm)
    if not path.exists():
        raise MemvecError(
            f"the export '{target.name}' writes no {path.name}: its method write gets the whole "
            "path, with its suffix."
        )


def inputs_read(target: Target, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
    """What a target reads of an item. Raises MemvecError for a tensor of another shape, or none."""
    shape = (len(item.vectors) + len(item.given), lm.width)
    inputs: Tensor = part_checks.check_tensor(
        "export", target.name, target.read(path, item, lm), shape
    )
    return inputs


def ids_decoded(target: Target, path: Path, item: Item, lm: FrozenLM) -> list[int]:
    """The token ids that a target generates. Raises MemvecError if it gives something else."""
    ids = target.decode(path, item, lm)
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise MemvecError(
            f"the export '{target.name}' has to return a list of token ids from decode."
        )
    return ids


def prompt(item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
    """The item's vectors and embeddings of its given tokens, in the model's dtype, on the CPU."""
    vectors = item.vectors.to(lm.dtype).cpu()
    return torch.cat([vectors, embedded(item.given, lm)])


@torch.no_grad()
def embedded(tokens: Sequence[int], lm: FrozenLM) -> Float[Tensor, "n D"]:
    """Embeddings of n token ids as the model gets them, on the CPU."""
    ids = torch.tensor(list(tokens), dtype=torch.long, device=lm.device)
    return lm.embed(ids).cpu() if tokens else torch.empty(0, lm.width, dtype=lm.dtype)


def target_of(name: str | Target) -> Target:
    """The target with a name; a Target is returned unchanged.

    Raises MemvecError, with the nearest known name, for others.
    """
    if isinstance(name, Target):
        return name
    if name not in registry.names("export"):
        raise MemvecError(
            f"unknown target '{name}': {did_you_mean(name, registry.names('export'))}"
        )
    kind = registry.get("export", name)
    if not (isinstance(kind, type) and issubclass(kind, Target)):
        raise MemvecError(f"the export '{name}' is no class derived from memvec.export.Target.")
    if lacking := [word for word in ("description", "suffix") if not hasattr(kind, word)]:
        raise MemvecError(f"the export '{name}' has no {' and no '.join(lacking)}.")
    return kind(name)
