"""Vectors in lm-evaluation-harness: a model that puts something else in the context's place.

    lm_eval --model memvec --model_args pretrained=NAME,context=crammed,vectors=8,tokens=48 ...

Releases of the harness that look for plug-ins know this model once memvec is installed (entry-point
group `lm_eval.models`). With the others, `python -m memvec.usable.harness` is the harness's own
command, with this model registered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from memvec.cram_job import CramStatus
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.usable.answers import EmbeddedRequest, likelihoods, written
from memvec.usable.columns import SPLIT, Column, Ids, Request, StandIn, request_of
from memvec.usable.recipe_files import named_files

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MemvecError(
        f"evaluation needs lm-evaluation-harness ({error}): "
        "pip install '.[eval]' in the repository."
    ) from error

BATCH = 16  # requests of a forward pass, where the harness leaves it open
NEW_TOKENS = 256  # written at the most, unless the task says otherwise: the harness's own figure
PRESET = "usable"


class Trace(NamedTuple):
    """What stood for the context of a request, by the task's name and the document's number."""

    task: str | None
    document: int | None
    context: Ids
    slots: int
    exact: bool | None
    question: str


@register_model("memvec")
class MemvecLM(HFLM):  # type: ignore[misc]
    """A frozen model that answers questions after what takes the place of their context.

    `pretrained`: name of a model for memvec.load_lm, or a FrozenLM. `context`: a column, 'full',
    'none', 'truncated' or 'crammed'. `vectors`, `tokens`: passages of at most so many tokens of the
    context become so many vectors, `crammed_at_once` of them at a time (default: what the memory
    allows; `batch_size` is of the answers). `cache`: a folder that keeps crammed contexts.
    `on_status`: called with the progress of cramming. `split`: what the question begins with, or
    the blank line in front of it. Every other argument is a field of the recipe, on top of
    `preset`.

    `traces` says what stood for the context of each request, in order. Raises MemvecError for bad
    arguments, or a model that cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | FrozenLM = "pocket",
        context: str = "full",
        *,
        vectors: int | str = 8,
        tokens: int | str = 48,
        cache: str | os.PathLike[str] | None = None,
        split: str = SPLIT,
        preset: str = PRESET,
        revision: str | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        crammed_at_once: int | str | None = None,
        on_status: Callable[[CramStatus], None] | None = None,
        **recipe: Any,
    ) -> None:
        changed = Recipe.of(preset, **recipe)
        self.split = split.replace("\\n", "\n")
        if not self.split:
            raise MemvecError("split must be the text at which a question begins, not empty.")
        if isinstance(pretrained, FrozenLM):
            self.lm = pretrained
        else:
            where = _device(device)
            self.lm = load_lm(pretrained, revision=revision, device=where, dtype=dtype)
        self.column = Column(
            self.lm,
            context,
            vectors=_whole("vectors", vectors),
            tokens=_whole("tokens", tokens),
            recipe=changed,
            batch_size=_whole("crammed_at_once", crammed_at_once) if crammed_at_once else None,
            cache=cache or None,
            on_status=on_status,
        )
        self.traces: list[Trace] = []
        fixed_size = isinstance(batch_size, int) or str(batch_size).isdigit()
        super().__init__(
            pretrained=self.lm.model,
            tokenizer=self.lm.tokenizer,
            backend="causal",
            batch_size=int(batch_size) if fixed_size else BATCH,  # type: ignore[arg-type]
        )

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy decoding writes it) of each request's answer.

        Raises MemvecError if no request of a task has a context, or one does not fit the model.
        """
        split = [
            request_of(self.lm, request.args[0], request.args[1], self.split)
            for request in requests
        ]
        stand_ins = self._stand_ins(requests, split)
        embedded = [
            EmbeddedRequest(stand_ins[r.context].inputs, r.question, r.answer) for r in split
        ]
        out = []
        for request, likelihood in zip(
            requests, likelihoods(self.lm, embedded, self.batch_size_per_gpu), strict=True
        ):
            out.append((likelihood.value, likelihood.greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, out[-1])
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes for each request, up to the first of the task's stops.

        Raises MemvecError as `loglikelihood`.
        """
        split = [request_of(self.lm, request.args[0], "", self.split) for request in requests]
        stand_ins = self._stand_ins(requests, split)
        out = []
        for request, r in zip(requests, split, strict=True):
            until, settings = _generation(request.args[1])
            embedded = EmbeddedRequest(stand_ins[r.context].inputs, r.question, ())
            out.append(written(self.lm, embedded, until, **settings))
            self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Raises MemvecError: a text whose every token is scored has no context."""
        raise MemvecError(
            "tasks that score whole texts (loglikelihood_rolling) have no context to replace: "
            "use the harness's model 'hf' for them."
        )

    def get_model_info(self) -> dict[str, Any]:
        """Everything about the model and its column that could change a number."""
        return {
            "memvec": self.lm.description(),
            "context": self.column.name,
            "vectors": self.column.vectors,
            "tokens": self.column.tokens,
            "crammed_at_once": self.column.batch_size,
            "split": self.split,
            "recipe": self.column.recipe.record(),
            **named_files(self.column.recipe),
        }

    def _stand_ins(self, requests: Sequence[Any], split: Sequence[Request]) -> dict[Ids, StandIn]:
        """The stand-in of each context; all new contexts are crammed together.

        Raises MemvecError if no request of a task has a context, so that every column would be the
        same.
        """
        have = {q.task_name for q, r in zip(requests, split, strict=True) if r.context}
        lacking = next((q.task_name for q in requests if q.task_name not in have), None)
        if self.column.name != "full" and lacking is not None:
            raise MemvecError(
                f"no request of {lacking} has a context in front of {self.split!r}: "
                "ask for examples (examples=N), or name the text that begins a question "
                "(split=TEXT)."
            )
        contexts = list(dict.fromkeys(r.context for r in split))
        self.column.prepare(contexts)
        stand_ins = {ids: self.column.stand_in(ids) for ids in contexts}
        for request, r in zip(requests, split, strict=True):
            stand_in = stand_ins[r.context]
            self.traces.append(
                Trace(
                    request.task_name,
                    request.doc_id,
                    r.context,
                    stand_in.slots,
                    stand_in.exact,
                    self.lm.text(r.question),
                )
            )
        return stand_ins


def _whole(name: str, value: Any) -> int:
    """A number from the harness's arguments. Raises MemvecError for anything else."""
    try:
        return int(value)
    except ValueError:
        raise MemvecError(f"{name} must be a whole number, not '{value}'.") from None


def _device(requested: str | None) -> str:
    """A device for load_lm; the harness names a GPU by default, even where there is none."""
    if requested is None or (requested in ("cuda", "cuda:0") and not torch.cuda.is_available()):
        return "auto"
    return requested


def _generation(task_settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The stops, and settings for the model's `generate`, of a task's generation settings."""
    settings = dict(task_settings)
    until = settings.pop("until", None) or []
    max_tokens = settings.pop("max_gen_toks", None) or settings.pop("max_new_tokens", None)
    settings["max_new_tokens"] = int(max_tokens or NEW_TOKENS)
    if not settings.get("temperature") and not settings.get("do_sample"):
        settings.pop("temperature", None)
        settings["do_sample"] = False
    return [until] if isinstance(until, str) else list(until), settings


def main() -> None:
    """The harness's own command, with this model registered; a MemvecError is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MemvecError as error:
        sys.stderr.write(f"memvec: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
