"""Sums of inputs in plain loops, of inputs that a test computes layer by layer."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import secateur
from secateur import LayerStatistics


def assert_sums(
    found: LayerStatistics, rows: Iterable[Iterable[float]], is_exact: bool = False
) -> None:
    """Compares sums with those of rows of numbers, one number for each channel."""
    listed = [list(map(float, row)) for row in rows]
    assert found.count == len(listed)
    columns = list(zip(*listed, strict=True))
    sums = {
        "sum": [sum(column) for column in columns],
        "sum_squares": [sum(x * x for x in column) for column in columns],
        "sum_abs": [sum(abs(x) for x in column) for column in columns],
    }
    for name, expected in sums.items():
        values = getattr(found, name)
        assert values.dtype == np.float64
        tolerance = 0 if is_exact else 1e-12
        np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def rows_of(values: Tensor) -> list[list[float]]:
    """The vectors along the last dimension."""
    found: list[list[float]] = values.detach().reshape(-1, values.shape[-1]).tolist()
    return found


def channels_of(images: Tensor) -> list[list[float]]:
    """The vectors of channels of each sample and position, in loops."""
    vectors: list[list[float]] = []
    for sample in images.detach():
        places = product(*map(range, sample.shape[1:]))
        vectors += [[float(channel[place]) for channel in sample] for place in places]
    return vectors


def gram_of(rows: Iterable[Iterable[float]]) -> npt.NDArray[np.float64]:
    """The sum of the outer products of rows."""
    return sum(np.outer(row, row) for row in map(np.asarray, rows))  # type: ignore[return-value]


def needed(values: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """What a layer is to have."""
    assert values is not None
    return values


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Values whose sums and products are exact in any floating dtype and order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def assert_close(one: secateur.Statistics, other: secateur.Statistics) -> None:
    """Compares statistics up to the rounding of float64, and grams to that of float32."""
    assert list(one) == list(other)
    for name in one:
        a, b = one[name], other[name]
        assert (a.count, a.input_dim) == (b.count, b.input_dim)
        for part in ("sum", "sum_squares", "sum_abs"):
            close(getattr(a, part), getattr(b, part), 1e-12)
        assert (a.gram is None) == (b.gram is None)
        if a.gram is not None:
            close(a.gram, b.gram, 1e-5)


def close(one: Any, other: Any, tolerance: float) -> None:
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
