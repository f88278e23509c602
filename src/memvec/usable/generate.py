"""Use vectors as context: generate text after vectors and a prompt.

The vectors of all passages, in order, replace the text in front of the prompt. The model's own
`generate` continues after the prompt, with the settings of the caller.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.around import front_rows
from memvec.errors import MemvecError, NotExactError, check_minimum, check_type
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.usable.certificate import check_usable
from memvec.usable.generation_config import generating_by
from memvec.usable.queries import text_inputs
from memvec.vectors import MemVectors

Context = Literal["vectors", "text", "nothing"]
NEW_TOKENS = 128  # default of max_new_tokens
# Settings of `generate` that `use` sets itself, or that generate several texts.
ITS_OWN = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "generation_config"} | {
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
}
SHORTER = "use fewer passages, or a shorter prompt or answer"


@plain_torch()
@torch.no_grad()
def use(
    lm: FrozenLM,
    mem: MemVectors | Sequence[MemVectors],
    prompt: str,
    *,
    passages: Sequence[int] | None = None,
    context: Context = "vectors",
    streamer: Any = None,
    force: bool = False,
    **settings: Any,
) -> str:
    """Generate text after vectors and a prompt; returns the text without the prompt.

    The vectors of several files are read in a row. `passages` selects passages of a single file by
    number. `force` accepts vectors of another model of the same width, such as the model before its
    fine-tuning. `context` 'text' or 'nothing' replaces the vectors, for comparison. `settings` are
    passed to the model's `generate` (`max_new_tokens`, `do_sample`, `temperature` ...). The default
    is greedy decoding of 128 tokens; the model's own generation config is not used. `streamer` is a
    streamer of transformers.

    Raises MemvecError for vectors of another model or without a trigger, files of different spaces
    or fronts, no file, no or an unknown passage, `passages` of several files, a setting of ITS_OWN,
    an unknown context, a prompt that is no `str` (or is empty without any other input), fewer than
    1 new tokens, inputs that do not fit the model's context, and a model without `generate`. Raises
    NotExactError if `context` is 'text' and the text is not exact.
    """
    check_type("lm", lm, FrozenLM, "memvec.load_lm")
    passages = passage_numbers(passages)
    files = as_files(mem, passages)
    check_prompt(prompt)
    if context not in get_args(Context):
        raise MemvecError(f"context is one of {', '.join(get_args(Context))}, not '{context}'.")
    prompt_ids = torch.tensor([lm.tokenize(prompt)], dtype=torch.long, device=lm.device)
    options = _options(lm, settings)
    new_tokens: int = options["max_new_tokens"]
    if context == "vectors":
        view, rows = in_a_row(lm, files, passages, force=force)
        inputs, cache = _opened(view, rows, prompt_ids)
        slots = len(view.front) + rows.shape[1] + prompt_ids.shape[1]
    else:
        ids: list[int] = []
        if context == "text":
            ids = tokens_in_a_row(lm, files, passages, force=force)
        else:  # 'nothing': check the files as for the other contexts
            for file in files:
                _chosen(lm, file, passages, force)
        # One BOS is in front of all, if the model has one.
        first = [text_inputs(lm, ids)] if ids or lm.bos_id is not None else []
        inputs, cache = torch.cat([*first, lm.embed(prompt_ids)], 1), None
        slots = inputs.shape[1]
    check_room(lm, slots, new_tokens, SHORTER)
    return write_after(lm, inputs.to(lm.dtype), options, streamer, cache)


def write_after(
    lm: FrozenLM,
    inputs: Float[Tensor, "1 N D"],
    options: dict[str, Any],
    streamer: Any = None,
    cache: Any = None,
) -> str:
    """Generate text after `inputs`; `options` are those of the model's `generate`.

    `cache` holds the keys and values in front of the inputs, or is None. Raises MemvecError for a
    model without `generate`.
    """
    ids, ends = _generated(lm, inputs, streamer, options, cache), set(end_ids(lm))
    return lm.text([token for token in ids if token not in ends])


def _options(lm: FrozenLM, settings: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate`: the caller's settings, and defaults for the others.

    Raises MemvecError for fewer than 1 new tokens, or a setting of ITS_OWN.
    """
    if refused := ITS_OWN & set(settings):
        raise MemvecError(
            "memvec.use writes one text of at most max_new_tokens after inputs of its own: leave "
            f"out {', '.join(sorted(refused))}."
        )
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = NEW_TOKENS
    check_minimum(1, max_new_tokens=options["max_new_tokens"])
    if "stop_strings" in settings:  # `generate` needs the tokenizer to find them
        options.setdefault("tokenizer", lm.tokenizer)
    return options


def check_prompt(prompt: object) -> None:
    """Raise MemvecError for a prompt of another type than `str`."""
    if not isinstance(prompt, str):
        raise MemvecError(f"the prompt is no str but of the type {type(prompt).__name__}.")


def passage_numbers(passages: Iterable[int] | None) -> list[int] | None:
    """Passage numbers as a list of int; None (all) stays None. Raises MemvecError for others."""
    try:
        return None if passages is None else [operator.index(i) for i in passages]
    except TypeError:
        shown = f"{passages!r:.60}"
        raise MemvecError(f"passages is a list of numbers, such as [0, 2], not {shown}.") from None


def as_files(
    mem: MemVectors | Sequence[MemVectors], passages: Sequence[int] | None
) -> list[MemVectors]:
    """One or several files as a list.

    Raises MemvecError for no file, no passage, and `passages` of several files.
    """
    if isinstance(mem, str) or not isinstance(mem, Iterable):
        check_type("mem", mem, MemVectors, "MemVectors.load")
    files = [mem] if isinstance(mem, MemVectors) else list(mem)
    if not files:
        raise MemvecError("there are no vectors to use: give at least one file.")
    for file in files:
        check_type("mem", file, MemVectors, "MemVectors.load")
    if passages is not None and len(files) > 1:
        raise MemvecError("passages are picked from one file: give a single one with them.")
    if passages is not None and not len(passages):
        raise MemvecError("there is no passage to use: give the number of at least one.")
    return files


def _chosen(
    lm: FrozenLM, mem: MemVectors, passages: Sequence[int] | None, force: bool
) -> Sequence[int]:
    """The indices of the passages of a file to use.

    Raises MemvecError for vectors of another model or without a trigger, or an unknown passage.
    """
    mem.check_model(lm, force=force)
    check_usable(mem)
    indices = range(len(mem.passages)) if passages is None else passages
    for i in indices:
        if not 0 <= i < len(mem.passages):
            raise MemvecError(f"there is no passage {i} in a file of {len(mem.passages)}.")
    return indices


def tokens_in_a_row(
    lm: FrozenLM,
    files: Sequence[MemVectors],
    passages: Sequence[int] | None = None,
    *,
    force: bool = False,
) -> list[int]:
    """The token ids of the passages that `in_a_row` takes, decoded from their vectors.

    Raises MemvecError as `in_a_row` does for a single file, and NotExactError for a passage that is
    not exact.
    """
    ids: list[int] = []
    for file in files:
        chosen = _chosen(lm, file, passages, force)
        ids += [token for tokens in _decoded(lm, file, chosen, force) for token in tokens]
    return ids


def _decoded(lm: FrozenLM, mem: MemVectors, chosen: Sequence[int], force: bool) -> list[list[int]]:
    """Token ids of the chosen passages of a file; the others are not decoded.

    The number of passages in a batch changes the rounding. If a passage is not exact for that
    reason, all are decoded in the batches in which they were certified.
    """
    if len(chosen) < len(mem.passages):
        records = [mem.passages[i] for i in chosen]
        header = mem.header.model_copy(update={"passages": records})
        part = MemVectors(mem.vectors[list(chosen)], header, mem.soft)
        with contextlib.suppress(NotExactError):
            return mem.checked(part.decode_passages(lm, force=force), chosen)
    decoded = mem.decode_passages(lm, force=force)
    return mem.checked([decoded[i] for i in chosen], chosen)


def in_a_row(
    lm: FrozenLM,
    files: Sequence[MemVectors],
    passages: Sequence[int] | None = None,
    *,
    force: bool = False,
) -> tuple[FrozenLM, Float[Tensor, "1 N W"]]:
    """The view that reads the vectors, and the vectors of all files in a row, scaled as context.

    `passages` selects passages of a single file; `force` accepts vectors of another model of the
    same width. Raises MemvecError for files of different spaces or fronts, for vectors of another
    model or without a trigger, and for an unknown passage.
    """
    chosen = [_chosen(lm, file, passages, force) for file in files]
    spaces = [mem.header.space for mem in files]
    if any(space != spaces[0] for space in spaces[1:]):
        raise MemvecError("files of different spaces cannot stand in one row: use them one by one.")
    view = files[0].view(lm)
    fronts = [front_rows(mem.view(lm)) for mem in files]
    if not all(torch.equal(front, fronts[0]) for front in fronts):
        raise MemvecError(
            "these files were crammed after different inputs in front (BOS or soft tokens), and "
            "only one of them can stand there: cram them with the same front and trigger."
        )
    rows = [
        mem.header.context_scale * mem.vectors[i].float()
        for mem, indices in zip(files, chosen, strict=True)
        for i in indices
    ]
    return view, torch.cat(rows)[None].to(lm.device)


@plain_torch()
@torch.no_grad()
def context_inputs(
    lm: FrozenLM,
    mem: MemVectors | Sequence[MemVectors],
    passages: Sequence[int] | None = None,
    *,
    force: bool = False,
) -> Float[Tensor, "N D"]:
    """The inputs in front of a prompt that make vectors its context, as in `memvec.use`.

    These are the front (BOS, soft tokens) and the vectors of all files in a row, multiplied by
    their `context_scale`, in the model's dtype, on the CPU. In other software, append the
    embeddings of a prompt without a BOS. `passages` selects passages of a single file; `force`
    accepts vectors of another model of the same width. Raises MemvecError for vectors of another
    model, without a trigger, or that are no inputs, for files of different fronts, for no or an
    unknown passage, and for `passages` of several files.
    """
    passages = passage_numbers(passages)
    files = as_files(mem, passages)
    view, rows = in_a_row(lm, files, passages, force=force)
    if view.reading.space != "inputs":
        raise MemvecError(
            f"vectors in the space '{view.reading.space}' are no inputs: use memvec.use, or cram "
            "the text in the space 'inputs'."
        )
    return view.after_front(rows)[0].cpu()


def _opened(
    lm: FrozenLM, rows: Float[Tensor, "1 N W"], prompt_ids: Int[Tensor, "1 n"]
) -> tuple[Float[Tensor, "1 m D"], Any]:
    """Inputs for `generate`, and the cache with the vectors, if they are keys and values.

    `generate` skips as many inputs as the cache has positions, so this adds as many zeros in front.
    Raises MemvecError for an empty prompt after vectors that predict nothing.
    """
    if not lm.reading.predicts and not prompt_ids.shape[1]:
        raise MemvecError(
            f"vectors in the space '{lm.reading.space}' predict nothing by themselves: give a "
            "prompt."
        )
    inputs, make_cache = lm.reading.opening(lm, rows, prompt_ids)
    cache = make_cache()
    if cache is not None:
        inputs = torch.cat([inputs.new_zeros(1, rows.shape[1], inputs.shape[2]), inputs], 1)
    return inputs, cache


def check_room(lm: FrozenLM, inputs: int, answer: int, remedy: str) -> None:
    """Raise MemvecError if there is no input, or if inputs and answer do not fit the context."""
    if inputs < 1:
        raise MemvecError(f"{lm.name} has no start token, so an answer needs a question.")
    if lm.context is not None and inputs + answer > lm.context:
        raise MemvecError(
            f"{inputs} inputs and an answer of {answer} tokens do not fit the context of {lm.name} "
            f"({lm.context}): {remedy}."
        )


def _generated(
    lm: FrozenLM,
    inputs: Float[Tensor, "1 N D"],
    streamer: Any,
    options: dict[str, Any],
    cache: Any,
) -> list[int]:
    from transformers import GenerationConfig

    if not hasattr(lm.model, "generate"):
        raise MemvecError(f"{lm.name} is no model that generates.")
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=lm.device)
    options.setdefault("pad_token_id", end_ids(lm)[0] if end_ids(lm) else 0)
    options.setdefault("use_cache", lm.has_cache)
    if cache is not None:
        options[str(lm.caching.argument)] = cache
    # Of the model's generation config only the end tokens are used, and not, say, its penalties.
    config = GenerationConfig(eos_token_id=end_ids(lm) or None)
    options |= {"inputs_embeds": inputs, "attention_mask": mask, "streamer": streamer}
    ids: list[int] = generating_by(lm, config).generate(**options)[0].tolist()
    return ids


def end_ids(lm: FrozenLM) -> list[int]:
    """Ids of the model's end-of-text tokens, from its generation config; empty without any."""
    end = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)
