"""What follows the vectors under the start rule 'bos': BOS, another token, or crammed soft tokens.

A crammed trigger is R input vectors that all passages share: they say 'now give the passage back',
and are trained once for a model (memvec.usable.trigger_training). A model reads them as tokens of
its own, *soft tokens*, whose ids come behind the rows of its embedding; only a view of the model
(`with_trigger`) has them, and no text is ever tokenized to them.

The file of a crammed trigger is safetensors: `trigger` (R, D), and metadata that name the model it
was trained for.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memvec.errors import MemvecError
from memvec.model.fingerprint import Fingerprint
from memvec.writing import write_atomically

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

FILE_NAME = "trigger.safetensors"  # in a model's folder
MADE_BY = "memvec trigger train"


@dataclass(frozen=True)
class CrammedTrigger:
    """R soft tokens (R, D), float32, and the hash of the file they came from ('' without one)."""

    rows: Float[Tensor, "R D"]
    identity: str = ""


def with_trigger(lm: FrozenLM, trigger: int | Float[Tensor, "R D"] | None) -> FrozenLM:
    """The model with another token, or soft tokens, between the vectors and the passage; None: BOS.

    Raises MemvecError for a token that the model does not have, or rows of another width.
    """
    if trigger is None and lm.other_trigger is None:
        return lm
    view = copy.copy(lm)
    view.soft = None
    if isinstance(trigger, Tensor):
        if trigger.shape[1] != lm.width:
            raise MemvecError(
                f"this trigger has vectors of {trigger.shape[1]} numbers and {lm.name} takes "
                f"{lm.width}: train one for this model with {MADE_BY}."
            )
        rows = len(lm.embedding.weight)  # type: ignore[arg-type]
        view.soft = trigger.to(lm.device)
        view.other_trigger = tuple(range(rows, rows + len(trigger)))
    elif trigger is not None and not 0 <= trigger < lm.vocab_size:
        raise MemvecError(
            f"{lm.name} has no token {trigger} to use as a trigger: its vocabulary has "
            f"{lm.vocab_size}."
        )
    else:
        view.other_trigger = None if trigger is None else (trigger,)
    return view


def embedded(lm: FrozenLM, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
    """Embeddings of token ids, soft tokens among them; gradients flow to the soft tokens."""
    assert lm.soft is not None
    rows = len(lm.embedding.weight)  # type: ignore[arg-type]
    soft = ids >= rows
    plain: Tensor = lm.embedding(ids.masked_fill(soft, 0))
    own = lm.soft.to(plain.dtype)[(ids - rows).clamp_min(0)]
    return torch.where(soft[..., None], own, plain)


def token_named(lm: FrozenLM, name: str) -> int:
    """The id of a token given as its text, or as '#' and its number.

    Raises MemvecError if the text is not one token.
    """
    if name.startswith("#") and name[1:].isdigit():
        return int(name[1:])
    ids = lm.tokenize(name)
    if len(ids) != 1:
        raise MemvecError(
            f"'{name}' is {len(ids)} tokens of {lm.name} and a trigger is one: give another, "
            f"its number as '#17', or a file of {MADE_BY}."
        )
    return ids[0]


def trigger_named(lm: FrozenLM, name: str) -> int | Float[Tensor, "R D"] | None:
    """The trigger of a recipe: 'bos' (None), 'auto', a token, or a file of a crammed trigger.

    'auto' is the crammed trigger in the model's folder, if there is one, else BOS. Raises
    MemvecError for a text that is not one token, or a file that is no trigger of this model.
    """
    if name == "auto":
        return None if lm.own_trigger is None else lm.own_trigger.rows
    if name == "bos":
        return None
    if (path := Path(name).expanduser()).suffix == ".safetensors":
        return load_trigger(path, lm).rows
    return token_named(lm, name)


def save_trigger(
    path: Path, rows: Float[Tensor, "R D"], lm: FrozenLM, about: dict[str, Any]
) -> None:
    """Write a crammed trigger, atomically; `about` is how it was trained."""
    metadata = {
        "format": "memvec-trigger",
        "version": "1",
        "model": json.dumps({"name": lm.name, **asdict(lm.fingerprint)}),
        "about": json.dumps(about),
    }
    write_atomically(path, save({"trigger": rows.detach().float().cpu().contiguous()}, metadata))


def load_trigger(path: Path, lm: FrozenLM) -> CrammedTrigger:
    """The crammed trigger in a file. Raises MemvecError as `stored_trigger` does."""
    return stored_trigger(path, lm)[0]


def stored_trigger(path: Path, lm: FrozenLM) -> tuple[CrammedTrigger, dict[str, Any]]:
    """The crammed trigger in a file, and how it was trained.

    Raises MemvecError if there is no such file, or if it is no trigger, is damaged, or was trained
    for other weights than the model's.
    """
    if not path.is_file():
        raise MemvecError(f"there is no trigger {path}: make one with {MADE_BY}.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            model, about = json.loads(facts["model"]), json.loads(facts["about"])
            rows = file.get_tensor("trigger")
        probe = tuple(map(float, model["probe"]))
        made_for = Fingerprint(model["config"], model["weights"], probe, model["dtype"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MemvecError(f"{path} is not a trigger that memvec can read: {error}.") from None
    if rows.dim() != 2 or not len(rows) or not bool(torch.isfinite(rows).all()):
        raise MemvecError(f"{path} holds no trigger, or one that is not finite: it is damaged.")
    if not made_for.matches(lm.fingerprint):
        raise MemvecError(
            f"{path} was trained for other weights (of {model.get('name')}) than those of "
            f"{lm.name}: train one for this model with {MADE_BY}."
        )
    identity = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return CrammedTrigger(rows.float(), identity), about
