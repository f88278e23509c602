"""An export target: how one passage is written for other software, and what that software reads.

A target is one file: a subclass that writes a passage and reads it back *as the target's own loader
would*, dtype and layout included. What is read back is what gets certified, so an export that lost
a bit on its way is refused before anybody uses it.
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

from memvec import __version__
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.model.precision import ATTENTION

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

SCRIPTS = Path(__file__).parent / "scripts"


def decoder(script: str) -> dict[str, Path]:
    """The programs of a folder that decodes itself where memvec is not installed."""
    return {"decode.py": SCRIPTS / script, "passages.py": SCRIPTS / "passages.py"}


def refuse_other_weights(lm: FrozenLM, reader: str) -> None:
    """Raise MemvecError for a model that other software reads with other numbers than here."""
    if lm.quantize or lm.autocast:
        how = f"quantized to {lm.quantize}" if lm.quantize else "in mixed precision"
        raise MemvecError(
            f"{lm.name} is {how} here, and {reader} reads its folder as it is: cram with the model "
            "in a dtype that it is run in, without --load quantize."
        )


@contextlib.contextmanager
def stock_attention(lm: FrozenLM) -> Iterator[None]:
    """The model with transformers' own attention within, where memvec gave it its own.

    What other software runs has to be certified as it runs it.
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

    `vectors` (K, D) as stored, behind what stands in front of them and with a crammed trigger
    behind them, if there are such; `given`: token
    ids that follow them in the input (BOS, or the passage's first token, or none); `new_tokens`:
    number of tokens to generate.
    """

    vectors: Float[Tensor, "K D"]
    given: tuple[int, ...]
    new_tokens: int


class Target:
    """Common skeleton; made with the name it is registered under.

    `dtype` names the only dtype the target takes, None for the model's own; `suffix` ends the name
    of each passage's file ('' for a folder); `description` is one line for the command line;
    `programs` are files that are copied into the folder, by the name that they get there (those
    of `decoder`), and `argument` is what its `decode.py` is given, '' where there is none.
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
        raise NotImplementedError

    def read(self, path: Path, item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
        """The inputs (N, D) that the target would hand to the model, from what was written."""
        raise NotImplementedError

    def decode(self, path: Path, item: Item, lm: FrozenLM) -> list[int]:
        """Greedy token ids from what was written, at batch size 1, as a reader of the export does.

        Our own decoder on the inputs of `read`; a target whose software is installed runs that.
        """
        prompt = self.read(path, item, lm).to(lm.device)
        return decode_ids(lm, prompt[None], [item.new_tokens])[0]

    def certified_by(self) -> str:
        """The program that `decode` runs, and its version, for the certificate."""
        return f"memvec {__version__}"


def prompt(item: Item, lm: FrozenLM) -> Float[Tensor, "N D"]:
    """[mem] vectors and the embeddings of the given tokens, in the model's dtype, on the CPU."""
    vectors = item.vectors.to(lm.dtype).cpu()
    return torch.cat([vectors, embedded(item.given, lm)])


@torch.no_grad()
def embedded(tokens: Sequence[int], lm: FrozenLM) -> Float[Tensor, "n D"]:
    """Embeddings of given tokens as the model sees them, on the CPU."""
    ids = torch.tensor(list(tokens), dtype=torch.long, device=lm.device)
    return lm.embed(ids).cpu() if tokens else torch.empty(0, lm.width, dtype=lm.dtype)
