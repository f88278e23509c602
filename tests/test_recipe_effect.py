"""Fields of a recipe that nothing reads are refused, and no others."""

from __future__ import annotations

import pytest

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.recipe_effect import check_effect


@pytest.mark.parametrize("reader", [{"coordinates": "low-dim"}, {"space": "shared-basis"}])
def test_a_field_does_something_where_one_of_its_readers_is_chosen(reader):
    check_effect(Recipe(dimensions=8, **reader), ["dimensions"])
    with pytest.raises(MemvecError, match="does nothing where space is 'inputs' and coordinates"):
        check_effect(Recipe(dimensions=8), ["dimensions"])
