"""Neighbours: vectors of other passages beside the crammed ones in queries (docs/usable.md).

After vectors that were crammed alone, the model expects the continuation of their text, so a row of
such vectors is a worse context. With neighbours, two of three queries are read after a row: the
vectors of another passage are in front of the trained vectors or after them, and the teacher reads
both texts. Neighbours are the passages of a file of usable vectors, and their vectors are fixed.
They are drawn for each passage with a seed from its own token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.around import front_rows
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import passage_seed
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.usable.certificate import check_usable
from memvec.usable.queries import Queries, continuations_after
from memvec.usable.teacher import NeighbourPlaces
from memvec.vectors import MemVectors

MAX_BESIDE = 1  # maximum number of neighbours in a query; up to three gave no better results
# (number in front, number after): the queries of a passage take these in turn.
PLACES = tuple((front, n - front) for n in range(MAX_BESIDE + 1) for front in range(n, -1, -1))


@dataclass(frozen=True)
class Neighbours:
    """The passages of the file: token ids, and vectors multiplied by their context scale."""

    ids: list[list[int]]
    vectors: Float[Tensor, "J k D"]

    @property
    def max_inputs(self) -> int:
        """The maximum number of inputs of the neighbours in a query."""
        return MAX_BESIDE * self.vectors.shape[1]

    def drawn(self, ids: Sequence[int], recipe: Recipe) -> NeighbourPlaces:
        """Draw the neighbours of a passage in each of its queries; a passage is never its own.

        Raises MemvecError if the file has no other passage.
        """
        others = [j for j, passage in enumerate(self.ids) if passage != list(ids)]
        if not others:
            raise MemvecError(
                f"the file of neighbours holds no passage but the one of {len(ids)} tokens that is "
                "to stand beside it: cram other texts for it."
            )
        generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed + 1))
        M, device = recipe.query_count, self.vectors.device
        drawn = torch.randint(len(others), (1, M, MAX_BESIDE), generator=generator)
        neighbours = torch.tensor(others)[drawn].to(device)
        places = torch.tensor([[PLACES[m % len(PLACES)] for m in range(M)]], device=device)
        return NeighbourPlaces(neighbours, places[..., 0], places.sum(-1))

    def queries(
        self, lm: FrozenLM, ids: Sequence[int], recipe: Recipe, beside: NeighbourPlaces
    ) -> Queries:
        """The queries of a passage: continuations of its text with the texts of its neighbours.

        Raises MemvecError if they do not fit the model's context.
        """
        neighbour_tokens = MAX_BESIDE * max(map(len, self.ids))
        longest = 1 + len(ids) + neighbour_tokens + recipe.query_tokens
        if lm.context is not None and longest > lm.context:
            raise MemvecError(
                f"a passage of {len(ids)} tokens, neighbours of {neighbour_tokens} and a query of "
                f"{recipe.query_tokens} do not fit the context of {lm.name} ({lm.context}): use a "
                "file of shorter neighbours, fewer query_tokens, or shorter passages."
            )
        texts = []
        for m in range(recipe.query_count):
            chosen = [self.ids[j] for j in beside.neighbours[0, m].tolist()]
            front, count = int(beside.in_front[0, m]), int(beside.count[0, m])
            row = [*chosen[:front], ids, *chosen[front:count]]
            texts.append([token for passage in row for token in passage])
        return continuations_after(lm, texts, ids, recipe)

    def row(
        self,
        vectors: Float[Tensor, "N K D"],
        query: Float[Tensor, "N W D"],
        neighbours: Int[Tensor, "N n"],
        in_front: Int[Tensor, " N"],
        count: Int[Tensor, " N"],
    ) -> tuple[Float[Tensor, "N S D"], Int[Tensor, " N"]]:
        """The inputs of each row (S = K + n k + W), and the number of neighbours' inputs in it.

        The order is: neighbours in front, the vectors, neighbours after them, the embedded query,
        and padding. `count` is the number of neighbours of a row, `in_front` of them in front.
        """
        K, k, W = vectors.shape[1], self.vectors.shape[1], query.shape[1]
        others = self.vectors[neighbours].flatten(1, 2).to(vectors.dtype)
        source = torch.cat([vectors, others, query.to(vectors.dtype)], 1)
        at = torch.arange(source.shape[1], device=vectors.device).expand(len(vectors), -1)
        front, used = (k * in_front)[:, None], (k * count)[:, None]
        # `index` is the position in `source` of each input.
        index = torch.where(at < front, K + at, at - front)
        index = torch.where(at >= front + K, at, index)
        of_query = at - K - used
        index = torch.where(of_query >= 0, K + others.shape[1] + of_query.clamp_max(W - 1), index)
        return source.gather(1, index[..., None].expand(-1, -1, vectors.shape[2])), used[:, 0]


def neighbours_of(lm: FrozenLM, recipe: Recipe) -> Neighbours:
    """Load the neighbours that a recipe names.

    `lm` is the view with the recipe's front and trigger. Raises MemvecError for a file of another
    model, for vectors that are not exact, without a trigger or with another front, and for a space
    or queries that do not support neighbours.
    """
    if lm.reading.space != "inputs":
        raise MemvecError(
            f"neighbours are inputs beside inputs: leave out the space '{lm.reading.space}'."
        )
    if recipe.queries != "continuations":
        raise MemvecError(
            f"queries after neighbours continue the text: leave out the queries '{recipe.queries}'."
        )
    mem = MemVectors.load(recipe.neighbours)
    mem.check_model(lm)
    check_usable(mem, f"the vectors in {recipe.neighbours}")
    if not torch.equal(front_rows(mem.view(lm)), front_rows(lm)):
        raise MemvecError(
            f"the neighbours in {recipe.neighbours} were crammed after other inputs in front (BOS "
            "or soft tokens): cram them with this front and trigger."
        )
    as_context = mem.header.context_scale * mem.vectors.float()
    return Neighbours(mem.tokens(lm), as_context.to(lm.device))
