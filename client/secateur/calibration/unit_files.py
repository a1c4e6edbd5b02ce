"""The tensors of stacks and experts in files of statistics: see docs/statistics.md."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.calibration.unit_statistics import UnitStatistics
from secateur.errors import InvalidStatistics
from secateur.tensors import LocalTensor, to_value

BLOCKS, EXPERTS = "block_influence", "expert_output"
_DTYPES = {"sum": "F64", "count": "I64"}
UNIT_PARTS = tuple(f"{kind}_{part}" for kind in (BLOCKS, EXPERTS) for part in _DTYPES)

Tensors = Mapping[str, LocalTensor]


def unit_tensors(kind: str, statistics: Mapping[str, UnitStatistics]) -> dict[str, LocalTensor]:
    """Returns the tensors of stacks, or of experts."""
    tensors = {}
    for name, units in statistics.items():
        tensors[f"{name}.{kind}_sum"] = _local("F64", units.sums.astype("<f8"))
        tensors[f"{name}.{kind}_count"] = _local("I64", units.counts.astype("<i8"))
    return tensors


def _local(dtype: str, values: npt.NDArray[Any]) -> LocalTensor:
    return LocalTensor(dtype, values.shape, lambda: values.view(np.uint8))


def read_units(kind: str, tensors: Tensors) -> dict[str, UnitStatistics]:
    """Reads stacks, or experts.

    Raises:
        InvalidStatistics: A tensor is missing, or has wrong values.
    """
    return {name: _units(f"{name}.{kind}", tensors) for name in _names(kind, tensors)}


def _names(kind: str, tensors: Iterable[str]) -> dict[str, None]:
    parts = {f"{kind}_{part}" for part in _DTYPES}
    split = (tensor.rpartition(".") for tensor in tensors)
    return {name: None for name, _, part in split if part in parts}


def _units(place: str, tensors: Tensors) -> UnitStatistics:
    sums, counts = (_values(f"{place}_{part}", tensors, part) for part in _DTYPES)
    if len(sums) != len(counts):
        raise InvalidStatistics(f"{place}_count: has {len(counts)} elements, not {len(sums)}")
    wrong = ~np.isfinite(sums)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidStatistics(f"{place}_sum[{index}]: {sums[index]} is not finite")
    if (counts < 0).any():
        index = int((counts < 0).argmax())
        raise InvalidStatistics(f"{place}_count[{index}]: {counts[index]} is below 0")
    return UnitStatistics(sums, counts)


def _values(name: str, tensors: Tensors, part: str) -> npt.NDArray[Any]:
    tensor, dtype = tensors.get(name), _DTYPES[part]
    if tensor is None:
        raise InvalidStatistics(f"{name}: is missing")
    if tensor.dtype != dtype or len(tensor.shape) != 1 or not tensor.shape[0]:
        raise InvalidStatistics(
            f"{name}: is {tensor.dtype} of shape {list(tensor.shape)}, not {dtype} with 1 dimension"
        )
    values: npt.NDArray[Any] = to_value(name, tensor, as_torch=False)
    return values
