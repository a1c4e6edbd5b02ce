"""How important the elements of a weight are, for the search of a permutation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.calibration.statistics import Statistics
from secateur.checks import shown, text_keys
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.tensors import as_array
from secateur.units.weights import Array

# Without statistics, with those of Wanda, and with those of RIA.
KINDS = ("magnitude", "wanda", "ria")


class Importances:
    """The importances of elements.

    Args:
        importance: One of KINDS, or arrays by the names of weights.
        statistics: Of the inputs; None for "magnitude" and arrays.
    """

    def __init__(self, importance: Any, statistics: Statistics | None) -> None:
        if isinstance(importance, str) and importance not in KINDS:
            raise InvalidSpec(f"importance: {shown(importance)} is none of {', '.join(KINDS)}")
        is_of_inputs = importance in KINDS[1:] if isinstance(importance, str) else False
        if not isinstance(importance, str):
            text_keys("importance", importance, "names to arrays")
        if is_of_inputs != (statistics is not None):
            raise InvalidSpec("statistics: are for importance 'wanda' or 'ria', which need them")
        self._importance, self._statistics = importance, statistics

    def of(self, name: str, weight: Array, dim: int) -> Array:
        """Returns those of a weight: its shape, none below 0.

        Args:
            name: Of the weight.
            weight: Its values.
            dim: The dimension of its inputs.
        """
        if isinstance(self._importance, Mapping):
            return _given(name, self._importance, weight)
        found = np.abs(weight)
        if self._statistics is None:
            return found
        layer = self._statistics.get(name)
        size = weight.shape[dim]
        if layer is None or layer.inputs != size or layer.input_dim != dim:
            raise InvalidStatistics(f"{name}: the statistics have not its {size} inputs")
        rms = np.expand_dims(layer.rms, [axis for axis in range(weight.ndim) if axis != dim])
        is_wanda = self._importance == "wanda"
        scaled: Array = found * rms if is_wanda else _relative(found) * np.sqrt(rms)
        return scaled


def _relative(values: Array) -> Array:
    """RIA: each value's share of its output's, and of its input's, as a matrix [out, in...]."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares = flat / flat.sum(0) + flat / flat.sum(1, keepdims=True)
    return np.asarray(np.nan_to_num(shares).reshape(values.shape))


def _given(name: str, importance: Mapping[str, Any], weight: Array) -> Array:
    if name not in importance:
        raise InvalidSpec(f"importance: has no array for {name}")
    given = importance[name]
    given = given.detach().cpu() if hasattr(given, "detach") else given
    values = as_array(name, given).astype(np.float64)
    if values.shape != weight.shape or not (values >= 0).all() or not np.isfinite(values).all():
        raise InvalidSpec(f"importance: {name}: is not {list(weight.shape)} finite numbers from 0")
    return values
