"""Counts the zeros of many small tensors at once, as measure.py does for one."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur_server.backends.batches import bits_of, layout_each, padded
from secateur_server.backends.keys import signed_bits
from secateur_server.backends.pieces import Layouts
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Measured:
    """Counts of tensors.

    Attributes:
        zeros, totals, pruned: As in Sparsity.
        sizes: The shapes of all tensors, one after another, with `dims` numbers each.
        dims: Dimensions of each tensor.
        rows, columns: Those of each tensor as a matrix of its first dimension and all others.
        layouts: The layouts of the elements that are not zero.
    """

    zeros: Ints
    totals: Ints
    pruned: Ints
    sizes: Ints
    dims: Ints
    rows: Ints
    columns: Ints
    layouts: Layouts


def measure_small(context: RequestContext, parameters: Sequence[Parameter]) -> Measured:
    """Measures small tensors of one dimension or more."""
    shapes = [parameter.weight.shape for parameter in parameters]
    units = [parameter.weight.numel() for parameter in parameters]
    masks = [parameter.mask for parameter in parameters]
    totals = np.array(units, np.int64)
    sizes = (totals + 7) // 8 * 8
    nonzero = bits_of([None if mask is None else mask.bits for mask in masks], units)
    if any(not parameter.is_nonzero for parameter in parameters):
        nonzero &= bits_of(_nonzero(parameters), units)
    layouts = layout_each(context, nonzero, np.cumsum(sizes) - sizes, shapes)
    kept = [
        of if mask is None else mask.kept(context) for mask, of in zip(masks, units, strict=True)
    ]
    rows = np.array([shape[0] for shape in shapes], np.int64)
    return Measured(
        totals - layouts.ones,
        totals,
        totals - np.array(kept, np.int64),
        np.array(list(itertools.chain.from_iterable(shapes)), np.int64),
        np.array([len(shape) for shape in shapes], np.int64),
        rows,
        totals // rows,
        layouts,
    )


def _nonzero(parameters: Sequence[Parameter]) -> list[Tensor | None]:
    """The bits of the elements that are not 0; None for tensors known to have no zeros."""
    found: list[Tensor | None] = [None] * len(parameters)
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        if not parameter.is_nonzero:
            alike[parameter.weight.dtype].append(index)
    for indices in alike.values():
        weights = [parameters[index].weight.reshape(-1) for index in indices]
        units = [weight.numel() for weight in weights]
        bits, sign = signed_bits(padded(weights, units))
        flags = (bits.numpy() & ~sign) != 0
        packed = torch.from_numpy(np.packbits(flags, bitorder="little"))
        parts = torch.split(packed, [(count + 7) // 8 for count in units])
        for index, part in zip(indices, parts, strict=True):
            found[index] = part
    return found
