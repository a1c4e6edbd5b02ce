"""The statistics of one layer's inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.calibration.triangle import Floats, Triangle
from secateur.errors import InvalidStatistics

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the inputs of a weight, for each input channel.

    Attributes:
        count: How many inputs were summed: tokens, rows, or positions of a convolution.
        sum_squares: The sum of x^2, float64, one for each input channel.
        sum: The sum of x; None if it is unknown.
        sum_abs: The sum of |x|; None if it is unknown.
        input_dim: The dimension of the weight along which its inputs lie.
        triangle: The upper triangle of the matrix `gram`; None if it was not collected. Layers
            that always had the same input have the same object.
    """

    count: float
    sum_squares: Doubles
    sum: Doubles | None = None
    sum_abs: Doubles | None = None
    input_dim: int = 1
    triangle: Triangle | None = None

    def __post_init__(self) -> None:
        for array in (self.sum_squares, self.sum, self.sum_abs):
            if array is not None:
                array.flags.writeable = False

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return len(self.sum_squares)

    @property
    def rms(self) -> Doubles:
        """The root of the mean of x^2."""
        root: Doubles = np.sqrt(self.sum_squares / self.count)
        return root

    @property
    def mean(self) -> Doubles | None:
        """The mean of x; None if `sum` is unknown."""
        return None if self.sum is None else self.sum / self.count

    @property
    def variance(self) -> Doubles | None:
        """The variance of x (of the population); None if `sum` is unknown."""
        mean = self.mean
        if mean is None:
            return None
        return np.maximum(self.sum_squares / self.count - mean**2, 0)

    @property
    def gram(self) -> Floats | None:
        """X^T X, whole, made anew at each access; None if it was not collected."""
        return None if self.triangle is None else self.triangle.matrix()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerStatistics):
            return NotImplemented
        names = [field.name for field in fields(self)]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LayerStatistics({', '.join(self.described())})"

    def described(self) -> Iterator[str]:
        """Yields what a person wants to know."""
        yield f"{self.inputs} inputs"
        yield f"{self.count:g} positions" if self.count % 1 else f"{int(self.count):,} positions"
        if self.triangle is not None:
            yield f"gram of {self.triangle.size}"
        if self.input_dim != 1:
            yield f"input_dim {self.input_dim}"


def _same(one: Any, other: Any) -> bool:
    is_array = isinstance(one, np.ndarray), isinstance(other, np.ndarray)
    return np.array_equal(one, other) if all(is_array) else not any(is_array) and bool(one == other)


def check_addable(name: str, one: LayerStatistics, other: LayerStatistics) -> None:
    """Refuses to add the statistics of layers that differ.

    Raises:
        InvalidStatistics: Their inputs differ, or only one has a gram.
    """
    for what in ("inputs", "input_dim"):
        if getattr(one, what) != getattr(other, what):
            raise InvalidStatistics(
                f"{name}: cannot add {what} {getattr(one, what)} and {getattr(other, what)}; "
                "add statistics of the same model"
            )
    sizes = [layer.triangle.size if layer.triangle else None for layer in (one, other)]
    if sizes[0] != sizes[1]:
        raise InvalidStatistics(
            f"{name}: cannot add a gram of size {sizes[0]} and one of size {sizes[1]}; "
            "calibrate both with gram=True, or both without"
        )


def added(
    one: LayerStatistics, other: LayerStatistics, triangle: Triangle | None
) -> LayerStatistics:
    """Adds the sums of one layer; what only one of them has is unknown in the result."""
    return LayerStatistics(
        one.count + other.count,
        one.sum_squares + other.sum_squares,
        _both(one.sum, other.sum),
        _both(one.sum_abs, other.sum_abs),
        one.input_dim,
        triangle,
    )


def _both(one: Doubles | None, other: Doubles | None) -> Doubles | None:
    return None if one is None or other is None else one + other
