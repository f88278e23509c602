"""A model for lm-evaluation-harness that replaces the context of a request, by vectors for example.

    lm_eval --model memvec --model_args pretrained=NAME,context=crammed,vectors=8,tokens=48 ...

Releases of the harness that load plug-ins find this model if memvec is installed (entry-point group
`lm_eval.models`). For other releases, `python -m memvec.usable.harness` is the harness's command
with this model registered.
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

BATCH = 16  # requests of a forward pass, if the harness sets no batch size
NEW_TOKENS = 256  # default of max_new_tokens, as in the harness
PRESET = "usable"


class Trace(NamedTuple):
    """The stand-in of a request's context, with the task's name and the document's number."""

    task: str | None
    document: int | None
    context: Ids
    slots: int
    exact: bool | None
    question: str


@register_model("memvec")
class MemvecLM(HFLM):  # type: ignore[misc]
    """A frozen model that answers requests after a stand-in for their context.

    `pretrained` is a model's name for memvec.load_lm, or a FrozenLM. `context` is a column: 'full',
    'none', 'truncated' or 'crammed'. Contexts are cut into passages of at most `tokens` tokens,
    with `vectors` vectors each, and `crammed_at_once` passages are crammed at once (default: as
    many as memory allows). `batch_size` is that of answers. `cache` is a folder that keeps crammed
    passages. `on_status` is called with the progress of cramming. `split` is the text at which a
    question begins. All other arguments are fields of the recipe, which replace those of `preset`.

    `traces` has the stand-in of each request, in order. Raises MemvecError for wrong arguments, or
    a model that cannot be loaded.
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
        """(log-likelihood in nats, whether greedy decoding generates it) of each request's answer.

        Raises MemvecError if no request of a task has a context, and if a request does not fit the
        model's context.
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
        """The generated text of each request, up to the first of the task's stop strings.

        Raises MemvecError as `loglikelihood` does.
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
        """Always raises MemvecError: these requests score a whole text, without a context."""
        raise MemvecError(
            "tasks that score whole texts (loglikelihood_rolling) have no context to replace: "
            "use the harness's model 'hf' for them."
        )

    def get_model_info(self) -> dict[str, Any]:
        """Everything about the model and its column that can change a result."""
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

        Raises MemvecError if no request of a task has a context, because all columns would then be
        equal.
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
    """An integer from an argument of the harness. Raises MemvecError for anything else."""
    try:
        return int(value)
    except ValueError:
        raise MemvecError(f"{name} must be a whole number, not '{value}'.") from None


def _device(requested: str | None) -> str:
    """A device for load_lm; the harness requests a GPU by default, even if there is none."""
    if requested is None or (requested in ("cuda", "cuda:0") and not torch.cuda.is_available()):
        return "auto"
    return requested


def _generation(task_settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A task's generation settings as stop strings, and settings of the model's `generate`."""
    settings = dict(task_settings)
    until = settings.pop("until", None) or []
    max_tokens = settings.pop("max_gen_toks", None) or settings.pop("max_new_tokens", None)
    settings["max_new_tokens"] = int(max_tokens or NEW_TOKENS)
    if not settings.get("temperature") and not settings.get("do_sample"):
        settings.pop("temperature", None)
        settings["do_sample"] = False
    return [until] if isinstance(until, str) else list(until), settings


def main() -> None:
    """Run the harness's command with this model registered; a MemvecError prints one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MemvecError as error:
        sys.stderr.write(f"memvec: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
