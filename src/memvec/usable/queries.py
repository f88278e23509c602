"""Queries: the tokens that the model reads after usable vectors, and after the text, in training.

A query is a row of token ids. The predictions of each token after the vectors are compared with
those after the text (memvec.usable.term). A source of queries is

    @register("queries", "mine")
    def mine(lm, ids, recipe):      # token ids of the passage -> Queries, or (M, L) and (M)
        ...

Random numbers depend only on the passage's token ids and the recipe's seed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import plugins, registry
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import passage_seed
from memvec.decoding import BATCH, free_running
from memvec.errors import MemvecError, did_you_mean
from memvec.model import memory
from memvec.model.caching import forward_with_cache
from memvec.model.lm import FrozenLM
from memvec.usable.teacher import TopTokens, likeliest
from memvec.writing import path_of

# From this vocabulary size on, sampling takes one random number per row instead of one per token.
# The CPU draws them, and for 128,000 tokens this takes longer than the model's pass on a GPU.
LARGE_VOCABULARY = 32_768
# Cache layers that hold only keys and values, so that all of their state can be repeated for rows.
REPEATABLE = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class Queries(NamedTuple):
    """The queries of a passage: ids (M, L), right-padded with 0, and the length of each row (M,).

    `teacher` holds the model's `teacher_top` likeliest tokens after the text at each position. It
    is None if the source did not compute them, because it did not sample after the text.
    """

    ids: Int[Tensor, "M L"]
    length: Int[Tensor, " M"]
    teacher: TopTokens | None = None


def text_inputs(lm: FrozenLM, ids: Sequence[int]) -> Float[Tensor, "1 N D"]:
    """The inputs of a text as context: BOS, if the model has one, and the tokens.

    A text that begins with BOS gets no second one. Without BOS, an empty text is replaced by the
    trigger, or by token 0 if the trigger is crammed, because a model needs an input.
    """
    if not ids and lm.bos_id is None:
        ids = [0] if lm.soft is not None else list(lm.trigger)
    ids = ids[1:] if ids and ids[0] == lm.bos_id else ids
    return after_bos(lm, torch.tensor([list(ids)], dtype=torch.long, device=lm.device))


def after_bos(lm: FrozenLM, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B N D"]:
    """The inputs of texts of one length: BOS, if the model has one, and the tokens."""
    bos = [] if lm.bos_id is None else [ids.new_full((len(ids), 1), lm.bos_id)]
    return lm.embed(torch.cat([*bos, ids], 1))


@dataclass
class Draws:
    """Samples tokens for some `rows` of a batch of `batch` rows.

    Random numbers are always drawn for the whole batch, so that a row gets the same ones if memory
    holds only a part of the batch.
    """

    generator: torch.Generator
    batch: int
    rows: slice

    def of(self, shares: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
        """Sample one token of each row by its probabilities (`shares`), the same on every device.

        The CPU draws the random numbers. The method is that of torch.multinomial, or inverse
        transform sampling (one number per row) for a large vocabulary.
        """
        V = shares.shape[1]
        if V < LARGE_VOCABULARY:
            drawn = torch.empty(self.batch, V).exponential_(generator=self.generator)
            return (shares.cpu() / drawn[self.rows]).argmax(-1).to(shares.device)
        uniform = torch.rand(self.batch, 1, dtype=torch.float64, generator=self.generator)
        sums = shares.double().cumsum(-1)
        sampled = uniform[self.rows].to(shares.device) * sums[:, -1:]
        return torch.searchsorted(sums, sampled, right=True)[:, 0].clamp(max=V - 1)


@torch.no_grad()
def continued(
    lm: FrozenLM,
    inputs: Float[Tensor, "B N D"],
    tokens: int,
    *,
    draws: Draws | None = None,
    top: int = 0,
    rows: int = 1,
) -> tuple[Int[Tensor, "R n"], list[TopTokens]]:
    """Generate `tokens` tokens after `inputs`; returns them, and the likeliest tokens at each.

    Tokens are sampled at temperature 1 by `draws`, or greedily without it. The list has the `top`
    likeliest tokens of each position; it is empty for top 0. With `rows` above 1, `inputs` is one
    row, which is read once for this number of continuations.
    """
    top_tokens: list[TopTokens] = []

    def choose(logits: Tensor, i: int) -> Tensor:
        if top:
            top_tokens.append(likeliest(logits, min(top, lm.vocab_size - 1)))
        if draws is None:
            return logits.argmax(-1)
        return draws.of(logits.softmax(-1))

    inputs, cache = (inputs, None) if rows == 1 else _shared(lm, inputs, rows)
    return torch.stack(
        list(free_running(lm, inputs, tokens, choose, cache=lambda: cache)), 1
    ), top_tokens


def _shared(
    lm: FrozenLM, inputs: Float[Tensor, "1 N D"], rows: int
) -> tuple[Float[Tensor, "R n D"], Any]:
    """For `rows` rows: the last of the inputs, and a cache of the others, which are read once.

    If the rows of the model's cache cannot be repeated: all inputs, and None.
    """
    argument = lm.caching.argument
    if argument is not None and inputs.shape[1] > 1:
        prefix = inputs[:, :-1].to(lm.dtype)
        _, cache = forward_with_cache(lm.model, argument, inputs_embeds=prefix)
        layers = [type(layer).__name__ for layer in getattr(cache, "layers", ())]
        if layers and set(layers) <= REPEATABLE:
            cache.batch_repeat_interleave(rows)
            return inputs[:, -1:].expand(rows, -1, -1), cache
    return inputs.expand(rows, -1, -1), None


def continuations(lm: FrozenLM, ids: Sequence[int], recipe: Recipe) -> Queries:
    """Queries that the model samples after the passage, at temperature 1."""
    return _sampled(lm, text_inputs(lm, ids), ids, recipe, recipe.teacher_top)


def continuations_after(
    lm: FrozenLM, texts: Sequence[Sequence[int]], ids: Sequence[int], recipe: Recipe
) -> Queries:
    """Queries as in `continuations`, one sampled after each of `texts`.

    The passage (`ids`) seeds the sampling. Texts of equal length are read as one batch.
    """
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    by_length: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(i)
    row_of_text: dict[int, tuple[Tensor, ...]] = {}
    for indices in by_length.values():
        table = torch.tensor([list(texts[i]) for i in indices], device=lm.device)
        inputs, n = after_bos(lm, table), len(indices)
        rows = _written(lm, inputs, n, recipe, generator=generator, top=recipe.teacher_top)
        row_of_text |= dict(zip(indices, rows, strict=True))
    return _as_queries([row_of_text[i] for i in range(len(texts))], recipe)


def samples(lm: FrozenLM, ids: Sequence[int], recipe: Recipe) -> Queries:
    """Queries that the model samples after BOS alone; the passage seeds the sampling.

    A model without BOS begins with the passage's first token.
    """
    bos = lm.bos_id if lm.bos_id is not None else ids[0]
    return _sampled(lm, lm.embed(torch.tensor([[bos]], device=lm.device)), ids, recipe)


def answered(lm: FrozenLM, ids: Sequence[int], recipe: Recipe, questions: Sequence[str]) -> Queries:
    """The user's questions, each followed by the model's greedy answer after the passage.

    Raises MemvecError for a question that leaves no room for an answer in `query_tokens`.
    """
    rows, lengths = [], []
    text = text_inputs(lm, ids)
    for question in questions:
        tokens = lm.tokenize(question)
        if len(tokens) >= recipe.query_tokens:
            raise MemvecError(
                f"a question of {len(tokens)} tokens leaves no room for an answer in queries of "
                f"{recipe.query_tokens} tokens: shorten it, or raise query_tokens."
            )
        after = lm.embed(torch.tensor([tokens], device=lm.device))
        inputs = torch.cat([text, after], 1)
        answer, _ = continued(lm, inputs, recipe.query_tokens - len(tokens))
        rows.append(torch.cat([torch.tensor(tokens, dtype=torch.long), answer[0].cpu()]))
        lengths.append(len(rows[-1]))
    return Queries(torch.stack(rows), torch.tensor(lengths))


def questions_of(path: str | os.PathLike[str]) -> list[str]:
    """The questions of a file, one on each line. Raises MemvecError if it cannot be used."""
    path = path_of(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise MemvecError(f"{path} is not UTF-8: questions are read from a text file.") from None
    except OSError as error:
        raise MemvecError(f"the questions in {path} cannot be read: {error.strerror}.") from None
    if not (questions := [line for line in lines if line.strip()]):
        raise MemvecError(f"{path} holds no question: write one on each line.")
    return questions


def queries_of(lm: FrozenLM, ids: Sequence[int], recipe: Recipe) -> Queries:
    """The queries of a passage, from the recipe's source or file of questions.

    Raises MemvecError for an unknown source, for a file without questions or with one that is too
    long, and for queries that do not fit the model's context after the text.
    """
    if lm.context is not None and len(ids) + 1 + recipe.query_tokens > lm.context:
        raise MemvecError(
            f"queries of {recipe.query_tokens} tokens do not fit the context of {lm.name} "
            f"({lm.context}) after a passage of {len(ids)}: use fewer query_tokens, or "
            "shorter passages."
        )
    if plugins.plain(recipe.queries) in registry.names("queries"):
        return _checked(registry.get("queries", recipe.queries)(lm, ids, recipe), lm, recipe)
    path = path_of(recipe.queries)
    if not path.exists():
        names = registry.names("queries")
        raise MemvecError(
            f"there is no source of queries, and no file, named '{recipe.queries}': "
            f"{did_you_mean(recipe.queries, names)}"
        )
    return answered(lm, ids, recipe, questions_of(path))


def _checked(made: Any, lm: FrozenLM, recipe: Recipe) -> Queries:
    """The queries that a source returned (`made`), padded to `query_tokens` columns.

    Raises MemvecError unless they are `query_count` rows of 1 to `query_tokens` token ids; of 2 at
    least if the first one is given.
    """
    M, L, shortest = recipe.query_count, recipe.query_tokens, 1 + int(not lm.reading.predicts)
    try:
        queries = Queries(*made)
        ids, length = queries.ids, queries.length
        rows, columns = ids.shape
        right = rows == M and columns <= L and tuple(length.shape) == (M,)
        right = right and not ids.is_floating_point() and not length.is_floating_point()
        right = right and bool(((length >= shortest) & (length <= columns)).all())
        right = right and bool(((ids >= 0) & (ids < lm.vocab_size)).all())
    except (TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise MemvecError(
            f"the queries '{recipe.queries}' have to be query_count ({M}) rows of {shortest} to "
            f"{L} token ids of {lm.name}, a tensor of integers (M, L), and the length of each row "
            "(M,)."
        )
    if queries.teacher is None:
        ids = torch.nn.functional.pad(ids, (0, L - columns))
    return Queries(ids, length, queries.teacher)


def _sampled(
    lm: FrozenLM,
    inputs: Float[Tensor, "1 N D"],
    ids: Sequence[int],
    recipe: Recipe,
    top: int = 0,
) -> Queries:
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    M = recipe.query_count
    return _as_queries(_written(lm, inputs, M, recipe, generator=generator, top=top), recipe)


def _written(
    lm: FrozenLM,
    inputs: Float[Tensor, "B N D"],
    M: int,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    top: int,
) -> list[tuple[Tensor, ...]]:
    """M continuations of M rows of inputs, or of a single row.

    A result has the token ids and, with `top`, the likeliest tokens (top, log_p, log_others).
    """
    shared = len(inputs) == 1
    states: dict[int, Tensor] = {}  # state of the generator at the first row of each batch

    def work(rows: slice) -> list[tuple[Tensor, ...]]:
        part_inputs, n = (inputs, len(range(M)[rows])) if shared else (inputs[rows], 1)
        first = rows.start - rows.start % BATCH
        generator.set_state(states.setdefault(first, generator.get_state()))
        part = slice(rows.start - first, rows.stop - first)
        draws = Draws(generator, min(BATCH, M - first), part)
        written, top_tokens = continued(
            lm, part_inputs, recipe.query_tokens, draws=draws, top=top, rows=n
        )
        parts = [torch.stack(part, 1) for part in zip(*top_tokens, strict=True)]
        return list(zip(written.cpu(), *parts, strict=True))

    return memory.in_batches(work, M, BATCH)


def _as_queries(rows: Sequence[tuple[Tensor, ...]], recipe: Recipe) -> Queries:
    """Queries from rows of (ids,) or (ids, top, log_p, log_others)."""
    written, *top_tokens = (torch.stack(part) for part in zip(*rows, strict=True))
    length = torch.full((len(written),), recipe.query_tokens)
    return Queries(written, length, TopTokens(*top_tokens) if top_tokens else None)
