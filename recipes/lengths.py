"""The number of vectors and of tokens of the passages of a training step.

Notable:
- each K has a target length, in tokens. It rises while the model gives passages of this length
  back, and falls while it does not;
- lengths lie on a grid with four steps for each doubling, so that only few shapes occur.

`pocket.py` imports this module; it is not run.
"""

import math

import torch

from decoder import Shape
from recipe import Recipe

# The numbers K of vectors of a passage, and the grid of its tokens per vector.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
LENGTHS = sorted({2, 3} | {round(4 * 2 ** (i / 4)) for i in range(33)})


class Lengths:
    """The target length in tokens of each K, and a running mean of the accuracy near it."""

    def __init__(self, recipe: Recipe, shape: Shape):
        self.recipe, self.shape = recipe, shape
        counts = [K for K in COUNTS if recipe.max_vectors >= K]
        self.targets = {K: recipe.first_target * K for K in counts}
        # Vectors after steps of descent (`losses.descended`) hold longer passages, so they have
        # targets of their own.
        self.inner_targets = dict(self.targets)
        self.accuracy = dict.fromkeys(self.targets, 0.0)

    def draw_count(self, rng) -> int:
        """Draw the K of a step."""
        is_several = torch.rand((), generator=rng) >= self.recipe.single_share
        larger_counts = [K for K in self.targets if K > 1]
        return (
            larger_counts[int(torch.randint(len(larger_counts), (), generator=rng))]
            if is_several and larger_counts
            else 1
        )

    def target(self, targets, K: int) -> float:
        """Target length of K vectors, in tokens.

        It has a lower bound, because K vectors are needed only for what one vector cannot hold.
        """
        return max(targets[K], self.recipe.least_share * K * targets[1])

    def on_grid(self, tokens: float, K: int, room: int = 2) -> int:
        """The allowed length that is closest to `tokens` on a log scale: K times one of LENGTHS.

        `room` positions of the model's context stay free.
        """
        min_tokens = 2 if K > 1 else 4
        max_tokens = (self.shape.max_position_embeddings - K - room) // K
        max_tokens = min(max_tokens, self.recipe.most_tokens)
        allowed = [n for n in LENGTHS if min_tokens <= n <= max_tokens] or [max_tokens]
        return K * min(allowed, key=lambda n: abs(math.log(n * K / tokens)))

    def draw_used(self, K: int, following: int, rng) -> int:
        """Draw the tokens of the passages of a step of use, with `following` tokens after them.

        They are 5 to 120 % of the target length, because vectors can be used as context for fewer
        tokens than they can give back.
        """
        share = 0.05 + 1.15 * float(torch.rand((), generator=rng))
        return self.on_grid(share * self.targets[K], K, following + 1)

    def draw(self, K: int, rng, *, inner: bool, wide: bool) -> tuple[int, float]:
        """Draw (tokens of the passages of a memory step, these divided by the target length)."""
        recipe = self.recipe
        target = self.target(self.inner_targets if inner else self.targets, K)
        longest = recipe.longest_wide if wide else recipe.longest
        span = longest - recipe.shortest
        share = recipe.shortest + span * float(torch.rand((), generator=rng))
        if float(torch.rand((), generator=rng)) < recipe.short_share:
            doublings = math.log2(max(recipe.shortest * target / 4, 1.0))
            share = 4 / target * 2 ** (doublings * float(torch.rand((), generator=rng)))
        T = self.on_grid(share * target, K)
        return T, T / target

    def adjust(self, K: int, share: float, accuracy: float, *, inner: bool) -> None:
        """Raise or lower the target length of K after a step.

        `share` is the length of its passages divided by the target length, and `accuracy` is their
        teacher-forced accuracy.
        """
        recipe = self.recipe
        targets = self.inner_targets if inner else self.targets
        # Each K > 1 is drawn less often, so its target changes by a larger factor.
        factor = 1.02 if K == 1 else 1.04
        if share > 0.8 and accuracy > recipe.rise_above:
            targets[K] = min(self.target(targets, K) * factor, float(recipe.most_tokens) * K)
        elif share < 1.2 and accuracy < recipe.fall_below:
            targets[K] = max(self.target(targets, K) / factor, 4.0)
        if 0.8 < share < 1.2 and not inner:
            self.accuracy[K] += 0.2 * (accuracy - self.accuracy[K])
