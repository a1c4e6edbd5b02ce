"""Statistics as a value."""

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import secateur
from secateur import LayerStatistics, Statistics
from secateur.calibration.triangle import Triangle
from tests.calibration.naive import needed


def layer(inputs: int = 2, factor: float = 1, **fields: Any) -> LayerStatistics:
    ones = np.ones(inputs)
    values: dict[str, Any] = {
        "count": 4 * factor,
        "sum_squares": 9 * factor * ones,
        "sum": 2 * factor * ones,
        "sum_abs": 3 * factor * ones,
    }
    return LayerStatistics(**(values | fields))


def triangle(size: int = 2, factor: float = 1) -> Triangle:
    matrix = np.arange(size * size, dtype=np.float64).reshape(size, size)
    return Triangle.of(factor * (matrix + matrix.T))


def test_a_mapping() -> None:
    layers = {"a": layer(), "b": layer(3)}
    statistics = Statistics(layers)
    layers["c"] = layer()
    assert list(statistics) == ["a", "b"]
    assert len(statistics) == 2
    assert statistics["b"].inputs == 3
    assert "c" not in statistics
    with pytest.raises(KeyError):
        statistics["c"]


def test_means() -> None:
    found = layer()
    assert found.rms.tolist() == [1.5, 1.5]
    assert needed(found.mean).tolist() == [0.5, 0.5]
    assert needed(found.variance).tolist() == [2, 2]
    unknown = layer(sum=None)
    assert unknown.mean is None
    assert unknown.variance is None
    constant = LayerStatistics(3, np.array([0.03]), np.array([0.3]))
    assert needed(constant.variance) >= 0


def test_values_cannot_be_changed() -> None:
    statistics = Statistics({"a": layer(triangle=triangle())})
    with pytest.raises(ValueError, match="read-only"):
        statistics["a"].sum_squares[0] = 1
    with pytest.raises(FrozenInstanceError):
        statistics["a"].count = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        statistics["a"] = layer()  # type: ignore[index]
    gram = needed(statistics["a"].gram)
    gram[:] = 0  # a new array each time
    assert needed(statistics["a"].gram).any()


@pytest.mark.parametrize("size", range(1, 9))
def test_a_triangle(size: int) -> None:
    matrix = np.random.default_rng(size).standard_normal((size, size))
    matrix += matrix.T
    found = Triangle.of(matrix)
    assert found.size == size
    assert found.values().tolist() == [
        np.float32(matrix[row, column]) for row in range(size) for column in range(row, size)
    ]
    assert (found.matrix() == matrix.astype(np.float32)).all()


def test_equality() -> None:
    assert Statistics({"a": layer()}) == Statistics({"a": layer()})
    assert Statistics({"a": layer(triangle=triangle())}) == Statistics(
        {"a": layer(triangle=triangle())}
    )
    for other in (
        layer(3),
        layer(count=5),
        layer(sum=None),
        layer(sum_abs=np.zeros(2)),
        layer(input_dim=0),
        layer(triangle=triangle()),
    ):
        assert Statistics({"a": layer()}) != Statistics({"a": other})
    assert Statistics({"a": layer()}) != Statistics({"b": layer()})
    assert Statistics({}) != {}
    assert layer() != 3


def test_a_sum() -> None:
    shared = triangle()
    one = Statistics({"a": layer(triangle=shared), "b": layer(triangle=shared), "c": layer(3)})
    two = Statistics(
        {
            "a": layer(factor=2, triangle=triangle(factor=2)),
            "d": layer(),
            "b": layer(triangle=shared),
        }
    )
    found = one + two
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"] == layer(factor=3, triangle=triangle(factor=3))
    assert found["b"] == layer(factor=2, triangle=triangle(factor=2))
    assert found["c"] == layer(3)
    assert found.gram_owners() == {"a": "a", "b": "b"}
    assert (one + one).gram_owners() == {"a": "a", "b": "a"}
    with pytest.raises(TypeError):
        one + 3  # type: ignore[operator]


def test_what_only_one_has_is_unknown_in_the_sum() -> None:
    found = Statistics({"a": layer(sum=None)}) + Statistics({"a": layer(sum_abs=None)})
    assert found["a"].sum is None
    assert found["a"].sum_abs is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (layer(3), "a: cannot add inputs 2 and 3; add statistics of the same model"),
        (layer(input_dim=0), "a: cannot add input_dim 1 and 0"),
        (layer(triangle=triangle()), "a: cannot add a gram of size None and one of size 2; calib"),
    ],
)
def test_sums_that_do_not_fit(other: LayerStatistics, message: str) -> None:
    with pytest.raises(secateur.InvalidStatistics, match=f"^{message}"):
        Statistics({"a": layer()}) + Statistics({"a": other})


def test_texts() -> None:
    statistics = Statistics(
        {"fc.weight": layer(count=12345), "t": layer(input_dim=0, triangle=triangle(), count=1.5)}
    )
    assert repr(statistics) == "Statistics(2 layers, 1 grams)"
    assert str(statistics).splitlines() == [
        "fc.weight  2 inputs, 12,345 positions",
        "t          2 inputs, 1.5 positions, gram of 2, input_dim 0",
    ]
    assert repr(statistics["t"]) == (
        "LayerStatistics(2 inputs, 1.5 positions, gram of 2, input_dim 0)"
    )
    assert str(Statistics({})) == "Statistics(0 layers)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies(copied: Any) -> None:
    shared = triangle()
    statistics = Statistics({"a": layer(triangle=shared), "b": layer(triangle=shared)})
    found = copied(statistics)
    assert found == statistics
    assert found.gram_owners() == statistics.gram_owners()
