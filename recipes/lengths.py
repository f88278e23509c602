"""How many vectors the passages of a step get, and how many tokens they have.

Notable:
- each K has a target length. It rises while the model gives such passages back, and falls while it
  does not;
- lengths lie on a grid of four to the octave, so that few shapes occur.

Used by `pocket.py`; nothing to run here.
"""

import math

import torch

from decoder import Shape
from recipe import Recipe

# Possible numbers of vectors of a passage, and of its tokens per vector.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
LENGTHS = sorted({2, 3} | {round(4 * 2 ** (i / 4)) for i in range(33)})


class Lengths:
    """Target lengths, in tokens, and running mean of the accuracy near them, for each K."""

    def __init__(self, recipe: Recipe, shape: Shape):
        self.recipe, self.shape = recipe, shape
        counts = [K for K in COUNTS if recipe.max_vectors >= K]
        self.targets = {K: recipe.first_target * K for K in counts}
        # vectors that took steps of descent hold longer passages, so they have their own targets
        self.inner_targets = dict(self.targets)
        self.accuracy = dict.fromkeys(self.targets, 0.0)

    def draw_count(self, rng) -> int:
        """K of a step."""
        several = torch.rand((), generator=rng) >= self.recipe.single_share
        more = [K for K in self.targets if K > 1]
        return more[int(torch.randint(len(more), (), generator=rng))] if several and more else 1

    def target(self, targets, K: int) -> float:
        """Target length of K vectors, in tokens.

        It has a lower bound, because K vectors are needed only for what one vector cannot hold.
        """
        return max(targets[K], self.recipe.least_share * K * targets[1])

    def on_grid(self, tokens: float, K: int, room: int = 2) -> int:
        """The allowed length closest to `tokens`, on a log scale: K times one of LENGTHS.

        `room` positions of the model's context stay free.
        """
        min_tokens = 2 if K > 1 else 4
        max_tokens = (self.shape.max_position_embeddings - K - room) // K
        max_tokens = min(max_tokens, self.recipe.most_tokens)
        allowed = [n for n in LENGTHS if min_tokens <= n <= max_tokens] or [max_tokens]
        return K * min(allowed, key=lambda n: abs(math.log(n * K / tokens)))

    def draw_used(self, K: int, following: int, rng) -> int:
        """Tokens of the passages of a step of use, with `following` tokens after them."""
        # from a few tokens a vector on: fewer are usable than can be given back
        share = 0.05 + 1.15 * float(torch.rand((), generator=rng))
        return self.on_grid(share * self.targets[K], K, following + 1)

    def draw(self, K: int, rng, *, inner: bool, wide: bool) -> tuple[int, float]:
        """Tokens of the passages of a memory step, and these over the target length."""
        recipe = self.recipe
        target = self.target(self.inner_targets if inner else self.targets, K)
        longest = recipe.longest_wide if wide else recipe.longest
        span = longest - recipe.shortest
        share = recipe.shortest + span * float(torch.rand((), generator=rng))
        if float(torch.rand((), generator=rng)) < recipe.short_share:
            octaves = math.log2(max(recipe.shortest * target / 4, 1.0))
            share = 4 / target * 2 ** (octaves * float(torch.rand((), generator=rng)))
        T = self.on_grid(share * target, K)
        return T, T / target

    def adjust(self, K: int, share: float, accuracy: float, *, inner: bool) -> None:
        """Move the target length of K after a step.

        `share` is the length of its passages over the target length, `accuracy` the teacher-forced
        accuracy on them.
        """
        recipe = self.recipe
        targets = self.inner_targets if inner else self.targets
        # K > 1 are drawn less often, so they take larger steps
        factor = 1.02 if K == 1 else 1.04
        if share > 0.8 and accuracy > recipe.rise_above:
            targets[K] = min(self.target(targets, K) * factor, float(recipe.most_tokens) * K)
        elif share < 1.2 and accuracy < recipe.fall_below:
            targets[K] = max(self.target(targets, K) / factor, 4.0)
        if 0.8 < share < 1.2 and not inner:
            self.accuracy[K] += 0.2 * (accuracy - self.accuracy[K])
