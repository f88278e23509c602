"""The types and shapes that all tests have checked: what is wrong is said, wherever it is."""

from __future__ import annotations

import dataclasses
import inspect
import sys

import pytest
import torch
from jaxtyping import Float, Int
from jaxtyping import TypeCheckError as Wrong
from torch import Tensor

import typechecks
from memvec import metrics
from memvec.cramming.recipe import Recipe


@typechecks.checked
def stacked(x: Float[Tensor, "B T"], y: Float[Tensor, "B T"], n: int = 2) -> Float[Tensor, "n B T"]:
    return torch.stack([x, y][:n])


@typechecks.checked
def transposed(x: Float[Tensor, "B T"]) -> Float[Tensor, "T B"]:
    return x  # wrong, unless B is T


@typechecks.checked
@dataclasses.dataclass(frozen=True)
class Point:
    x: Float[Tensor, " D"]
    y: Float[Tensor, " D"]
    name: str = ""


@typechecks.checked
@dataclasses.dataclass
class Numbers:
    """Its `__init__` has the code of the other, but not its types."""

    x: int
    y: int
    name: str = ""


X = torch.zeros(2, 3)


def test_letters_mean_one_number_in_a_call_and_another_in_the_next():
    assert stacked(X, X).shape == (2, 2, 3)
    assert stacked(X.T, X.T).shape == (2, 3, 2)
    for wrong in ((X, X.T), (X, X[0]), (X, X.int()), (X, None), (X, X, "2")):
        with pytest.raises(Wrong):
            stacked(*wrong)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        stacked(X)


def test_a_result_is_checked_with_the_arguments():
    assert transposed(X[:, :2]).shape == (2, 2)
    with pytest.raises(Wrong):
        transposed(X)


def test_a_function_in_another_keeps_its_checks_and_has_its_own_surroundings():
    def made(factor):
        @typechecks.checked
        def inner(x: Int[Tensor, " T"], *more: int, **named: str) -> Int[Tensor, " T"]:
            return x * factor

        return inner

    ids = torch.tensor([1, 2])
    for factor in (2, 3):
        assert made(factor)(ids).tolist() == [factor, 2 * factor]
        for more, named in (((1.5,), {}), ((), {"a": 1})):
            with pytest.raises(Wrong):
                made(factor)(ids, *more, **named)
        with pytest.raises(Wrong):
            made(factor)(ids[0])


def test_of_many_calls_the_first_are_checked_and_then_some(monkeypatch):
    monkeypatch.setattr(typechecks, "FIRST", 3)
    monkeypatch.setattr(typechecks, "EVERY", 4)
    noticed = []
    for _ in range(12):
        try:
            transposed(X)
            noticed.append(False)
        except Wrong:
            noticed.append(True)
    assert noticed == [True] * 4 + [False] * 3 + [True] + [False] * 3 + [True]


def test_each_test_begins_with_checks():
    """Whatever the tests before it called, as the one above did."""
    with pytest.raises(Wrong):
        transposed(X)


def test_a_dataclass_is_checked_when_it_is_made():
    assert Point(X[0], X[1], "a").name == "a"
    for wrong in ((X[0], X[:, 0]), (X, X), (X[0], X[1], 1)):
        with pytest.raises(Wrong):
            Point(*wrong)
    assert Numbers(1, 2).y == 2
    with pytest.raises(Wrong):
        Numbers(X[0], X[1])


def test_checks_can_be_switched_off(untyped):
    assert transposed(X) is X
    assert Point(X, 1).y == 1


def test_memvecs_own_functions_have_them():
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    assert metrics.margins(logits, ids).shape == (2, 3)
    for wrong in ((logits, ids[:, :2]), (logits[0], ids), (logits, ids.float())):
        with pytest.raises(Wrong):
            metrics.margins(*wrong)
    with pytest.raises(Wrong):
        Recipe(steps="many")


def test_no_function_of_memvec_is_without_checks():
    """Of all modules that this process has imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("memvec.")]
    functions = {
        (module.__name__, name): function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    }
    assert len(functions) > 50
    assert [where for where, function in functions.items() if not hasattr(function, "checks")] == []
