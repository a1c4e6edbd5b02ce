"""Factors of importances, computed from the statistics of layers' inputs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.calibration.layer import Doubles, LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.checks import shown
from secateur.errors import InvalidSpec
from secateur.spec import INPUTS, OUTPUTS, Arrays
from secateur.tables import listed

AnyStatistics = Statistics | str | os.PathLike[str]

# Names in an error.
_SHOWN = 3


def statistics_of(value: Any) -> Statistics:
    """Returns statistics: themselves, or those of a file.

    Raises:
        InvalidSpec: `value` is neither.
        InvalidStatistics: The file cannot be read, or is damaged.
    """
    if isinstance(value, str | os.PathLike):
        return Statistics.load(value)
    if not isinstance(value, Statistics):
        raise InvalidSpec(
            f"statistics: {shown(value)} is not what secateur.calibrate returns, or the path of a "
            "file of it"
        )
    return value


def calibrated_names(
    statistics: Statistics, patterns: Sequence[str], by_gram: bool = False
) -> list[str]:
    """Returns the weights that names and globs mean.

    Globs mean weights with statistics, but not tables of embeddings. With `by_gram` they mean
    weights with a Gram matrix, if they match any.

    Raises:
        InvalidSpec: A name has no statistics, or a glob matches none.
    """
    known = [name for name, layer in statistics.items() if not _is_table(layer)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern in statistics:
            found[pattern] = None
            continue
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            raise InvalidSpec(f"tensors: {pattern!r} {_why_unknown(statistics, pattern)}")
        with_gram = [name for name in matched if statistics[name].triangle is not None]
        found |= dict.fromkeys(with_gram if by_gram and with_gram else matched)
    return list(found)


def _why_unknown(statistics: Statistics, pattern: str) -> str:
    calibrated = f"calibrated are {listed(list(statistics), _SHOWN)}"
    if any(character in pattern for character in "*?["):
        return f"matches no weight with statistics; {calibrated}"
    return f"has no statistics; calibrate its layer, or leave it out; {calibrated}"


@dataclass(frozen=True)
class Factors:
    """The factors of an importance: for each input of a layer the root mean square, to a power.

    Attributes:
        statistics: Of the inputs of weights.
        power: The exponent.
        files: The argument `statistics`, if it was the path of a file.
    """

    statistics: Statistics = field(repr=False)
    power: float
    files: Mapping[str, str] = field(default_factory=dict)

    def arrays(self, names: Iterable[str]) -> dict[str, Arrays]:
        """Computes the arrays of a rule, by the fields that refer to them. Each name is known.

        Layers with the same input have the same array, which is sent once.
        """
        found: dict[str, dict[str, Any]] = {INPUTS: {}, OUTPUTS: {}}
        shared: dict[bytes, npt.NDArray[np.float32]] = {}
        for name in names:
            layer = self.statistics[name]
            # Where the inputs lie along dimension 0, the factors are those of "outputs".
            path = INPUTS if layer.input_dim == 1 else OUTPUTS
            factors = self._raised(name, layer.rms)
            found[path][name] = shared.setdefault(factors.tobytes(), factors)
        return {path: arrays for path, arrays in found.items() if arrays}

    def _raised(self, name: str, rms: Doubles) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore", under="ignore"):
            # The usual powers without `**`, so that all machines send the same bits.
            usual = {0.5: np.sqrt, 1.0: np.positive}.get(self.power)
            raised = usual(rms) if usual else rms**self.power
            factors: npt.NDArray[np.float32] = raised.astype(np.float32)
        if not np.isfinite(factors).all():
            raise InvalidSpec(f"power: {self.power} makes infinite factors of {name}; lower it")
        return factors

    def by_input_dim(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Sorts weights by the dimension along which their inputs lie."""
        found: dict[int, list[str]] = {}
        for name in names:
            found.setdefault(self.statistics[name].input_dim, []).append(name)
        return found


def _is_table(layer: LayerStatistics) -> bool:
    """Whether each input is 1 or 0, and so equals its square, as those of embeddings do."""
    return (
        layer.input_dim == 0
        and layer.sum is not None
        and np.array_equal(layer.sum, layer.sum_squares)
    )
