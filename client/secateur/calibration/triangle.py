"""The upper triangle of a symmetric matrix, in half of the matrix's memory."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def triangle_length(size: int) -> int:
    """Returns how many elements the upper triangle of a matrix of `size` rows has."""
    return size * (size + 1) // 2


def triangle_size(length: int) -> int | None:
    """Returns how many rows a matrix has by the length of its triangle; None if none fits."""
    size = (math.isqrt(8 * length + 1) - 1) // 2
    return size if size and triangle_length(size) == length else None


class Triangle:
    """A symmetric matrix of float32, kept as its upper triangle, row by row.

    Attributes:
        size: The number of rows, which is that of columns.

    Args:
        size: See above.
        read: Returns the triangle, flat. It is called whenever the values are needed.
    """

    def __init__(self, size: int, read: Callable[[], Floats]) -> None:
        self.size, self._read = size, read

    @classmethod
    def of(cls, matrix: npt.NDArray[Any]) -> "Triangle":
        """Takes the upper triangle of a matrix, and rounds it to float32."""
        size = len(matrix)
        values, begin = np.empty(triangle_length(size), np.float32), 0
        with np.errstate(over="ignore"):  # the caller checks for infinities
            for row in range(size):
                values[begin : begin + size - row] = matrix[row, row:]
                begin += size - row
        return cls.held(values)

    @classmethod
    def held(cls, values: Floats) -> "Triangle":
        """Keeps the values of a triangle, flat, which are valid."""
        size = triangle_size(len(values))
        assert size is not None
        values.flags.writeable = False
        return cls(size, lambda: values)

    def values(self) -> Floats:
        """Returns the triangle, flat."""
        return self._read()

    def matrix(self) -> Floats:
        """Returns a new array: the whole matrix."""
        values, size, begin = self.values(), self.size, 0
        full = np.empty((size, size), np.float32)
        for row in range(size):
            full[row, row:] = full[row:, row] = values[begin : begin + size - row]
            begin += size - row
        return full

    def __add__(self, other: "Triangle") -> "Triangle":
        total = self.values().astype(np.float64)
        total += other.values()
        return Triangle.held(total.astype(np.float32))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Triangle):
            return NotImplemented
        return self is other or np.array_equal(self.values(), other.values())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies the values, and not the function that reads them."""
        return Triangle.held, (self.values().copy(),)
