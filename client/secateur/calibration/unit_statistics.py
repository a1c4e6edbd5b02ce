"""Statistics with one number for each unit: layers of a stack, and experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.calibration.layer import Doubles
from secateur.errors import InvalidStatistics

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """A sum over tokens for each unit.

    Attributes:
        sums: One for each unit, float64.
        counts: How many tokens each unit computed, int64.
    """

    sums: Doubles
    counts: Counts

    def __post_init__(self) -> None:
        self.sums.flags.writeable = self.counts.flags.writeable = False

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self.sums)

    @property
    def means(self) -> Doubles:
        """The mean of each unit; 0 if no token reached it."""
        means: Doubles = self.sums / np.maximum(self.counts, 1)
        return means

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitStatistics):
            return NotImplemented
        is_same = np.array_equal(self.sums, other.sums)
        return is_same and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UnitStatistics({self.described()})"

    def described(self) -> str:
        """Says what a person wants to know."""
        return f"{self.units} units, {int(self.counts.max(initial=0)):,} tokens at most"


def merged(
    one: Mapping[str, UnitStatistics], other: Mapping[str, UnitStatistics]
) -> dict[str, UnitStatistics]:
    """Adds the sums of each name.

    Raises:
        InvalidStatistics: Both have a name with different numbers of units.
    """
    found = {**one, **other}
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.units != b.units:
            raise InvalidStatistics(
                f"{name}: cannot add units {a.units} and {b.units}; add statistics of the same "
                "model"
            )
        found[name] = UnitStatistics(a.sums + b.sums, a.counts + b.counts)
    return found
