"""tests/typechecks.py, which checks types and shapes in all tests, raises for every wrong one."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any, Literal

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
    """Its `__init__` has the same code as that of `Point`, with other types."""

    x: int
    y: int
    name: str = ""


X = torch.zeros(2, 3)


def test_a_letter_is_one_number_in_a_call_and_may_be_another_in_the_next():
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


@typechecks.checked
def counted(x: Float[Tensor, " T"], rule: Literal["a", "b"], result: Any) -> int:
    return result


@typechecks.checked
def sized(x: Float[Tensor, " T"], sizes: dict[str, int]) -> Float[Tensor, " T"]:
    return x


def test_a_call_is_wrong_after_a_right_one_that_differs_in_any_way_that_types_tell():
    """Shapes, dtypes, classes, values of strings, contents of containers, and the result."""
    for wrong in ((X, "a", 3), (X[0].long(), "a", 3), ([0.0], "a", 3), (X[0], "c", 3)):
        assert counted(X[0], "a", 3) == counted(X[0], "b", 3) == 3
        with pytest.raises(Wrong):
            counted(*wrong)
    assert sized(X[0], {"n": 1}).shape == (3,)
    with pytest.raises(Wrong):
        sized(X[0], {"n": "1"})
    returned = iter([3, "3", 3])

    @typechecks.checked
    def drawn(x: Float[Tensor, " T"]) -> int:
        return next(returned)

    assert drawn(X[0]) == 3
    with pytest.raises(Wrong):
        drawn(X[0])
    assert drawn(X[0]) == 3


def test_an_inner_function_is_checked_and_keeps_its_closure():
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


def test_the_first_calls_are_checked_and_then_every_fourth(monkeypatch):
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


def test_the_count_of_calls_starts_again_in_each_test():
    """The previous test called the same function 12 times."""
    with pytest.raises(Wrong):
        transposed(X)


def test_the_fields_of_a_dataclass_are_checked():
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


def test_functions_and_classes_of_memvec_are_checked():
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    assert metrics.margins(logits, ids).shape == (2, 3)
    for wrong in ((logits, ids[:, :2]), (logits[0], ids), (logits, ids.float())):
        with pytest.raises(Wrong):
            metrics.margins(*wrong)
    with pytest.raises(Wrong):
        Recipe(steps="many")


def test_every_function_of_memvec_has_checks():
    """These are the functions of all modules that this process has imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("memvec.")]
    functions = {
        (module.__name__, name): function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    }
    assert len(functions) > 50
    assert [where for where, function in functions.items() if not hasattr(function, "checks")] == []
