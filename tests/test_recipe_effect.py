"""A field of a recipe is refused if no chosen part reads it, and only then."""

from __future__ import annotations

import pytest

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.recipe_effect import check_effect


@pytest.mark.parametrize("reader", [{"coordinates": "low-dim"}, {"space": "shared-basis"}])
def test_a_field_is_accepted_if_a_chosen_part_reads_it(reader):
    check_effect(Recipe(dimensions=8, **reader), ["dimensions"])
    with pytest.raises(MemvecError, match="does nothing where space is 'inputs' and coordinates"):
        check_effect(Recipe(dimensions=8), ["dimensions"])
