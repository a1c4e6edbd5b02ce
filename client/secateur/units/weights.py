"""The values of weights as arrays, which need neither torch nor ml_dtypes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.calibration.layer import Doubles
from secateur.errors import InvalidSpec
from secateur.model import Source
from secateur.source import read_source
from secateur.tensors import LocalTensor, prior_mask, to_value

Array = npt.NDArray[Any]

_PIECE = 1 << 21  # elements that are converted to float64 at once


def read_here(source: Any, key: str | None = None) -> Source:
    """Reads a source whose values are needed in this process.

    Raises:
        InvalidSpec: The model is on the server.
    """
    model = read_source(source, key)
    if not model.is_here:
        raise InvalidSpec("source: the model is on the server; download it first")
    return model


def weight_of(model: Source, name: str) -> Array:
    """Returns a floating tensor of a source in float32 or float64; a pair is its X, with zeros."""
    values = floats(name, model.prunable()[name])
    if (mask := model.pairs().get(name)) is not None:
        kept = prior_mask(model.tensors[mask]).reshape(values.shape)
        values = np.where(kept, values, values.dtype.type(0))
    return values


def floats(name: str, tensor: LocalTensor) -> Array:
    """Returns the values of a floating tensor in float32, or in float64 if it has that."""
    if tensor.dtype == "BF16":  # numpy has no such dtype: the upper half of a float32
        bits = tensor.read().view("<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    values = np.asarray(to_value(name, tensor, as_torch=False))
    return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)


def pieces(values: Array) -> Iterator[tuple[slice, Doubles]]:
    """Yields the rows of an array in float64, a limited number of elements at a time."""
    rows = max(1, _PIECE // max(1, values[:1].size))
    for begin in range(0, len(values), rows):
        part = slice(begin, begin + rows)
        yield part, values[part].astype(np.float64)


def squared_norms(values: Array, dim: int) -> Doubles:
    """Returns the sum of squares of each slice of a dimension."""
    found = np.zeros(values.shape[dim])
    others = tuple(other for other in range(values.ndim) if other != dim)
    for part, piece in pieces(values):
        sums = np.square(piece).sum(others)
        if dim == 0:
            found[part] = sums
        else:
            found += sums
    return found
