"""Counts the zeros of a tensor, and where they are."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import picked
from secateur_server.backends.masks import Mask, any_of_slices, mask_of
from secateur_server.backends.pieces import around
from secateur_server.report.structure import Structure, structure_of, structure_of_few
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

# The most tensors that a message lists; there may be tens of thousands.
MOST_NAMED = 10


@dataclass(frozen=True)
class Sparsity:
    """Counts of one tensor.

    Attributes:
        zeros: Elements that are 0 with the mask applied.
        total: All elements.
        pruned: Elements that the mask prunes.
        zero_slices: For each dimension the slices that are wholly zero; empty under 2 dimensions.
        structure: N:M patterns, and blocks of zeros.
    """

    zeros: int
    total: int
    pruned: int
    zero_slices: tuple[int, ...]
    structure: Structure


def measure(context: RequestContext, parameter: Parameter) -> Sparsity:
    """Measures a parameter. -0.0 counts as zero."""
    mask, total = parameter.mask, parameter.weight.numel()
    pruned = parameter.count_pruned(context)
    zeros = pruned if parameter.is_nonzero else pruned + _zeros_kept(context, parameter)
    nonzero = _Nonzero(parameter, mask if zeros == pruned else None)
    shape = parameter.weight.shape
    if shape and zeros > 0 and total <= AT_ONCE:
        bits = nonzero.whole(context).bits
        layouts = backend_for(bits.device).layouts(bits, np.zeros(1, np.int64), [shape])
        along = zip(shape, layouts.nonzero_slices.tolist(), strict=True) if len(shape) > 1 else ()
        zero_slices = tuple(size - count for size, count in along)
        return Sparsity(zeros, total, pruned, zero_slices, structure_of_few(shape, layouts))
    structure = structure_of(context, shape, zeros, partial(nonzero.whole, context))
    return Sparsity(zeros, total, pruned, _zero_slices(context, nonzero, zeros), structure)


@dataclass(frozen=True)
class _Nonzero:
    """Tells which elements of a parameter are not zero with its mask applied.

    Attributes:
        parameter: The tensor and its mask.
        known: The parameter's mask, if it keeps no zeros.
    """

    parameter: Parameter
    known: Mask | None

    def flags(self, begin: int, end: int) -> Tensor:
        """Whether each element of [begin, end) is not zero: bool, 1-D."""
        if self.known is not None:
            return self.known.flags(begin, end)
        weight, mask = self.parameter.weight, self.parameter.mask
        flags = backend_for(weight.device).nonzero(weight.reshape(-1)[begin:end])
        return flags if mask is None else flags & mask.flags(begin, end)

    def at(self, index: Tensor) -> Tensor:
        """Whether elements at flat indices are not zero: bool, in the shape of `index`."""
        if self.known is not None:
            return self.known.at(index)
        nonzero = picked(self.parameter.weight.reshape(-1), index) != 0
        return nonzero if self.parameter.mask is None else nonzero & self.parameter.mask.at(index)

    def whole(self, context: RequestContext) -> Mask:
        """The mask of all elements that are not zero."""
        weight = self.parameter.weight
        return self.known or mask_of(context, self.flags, weight.numel(), weight.device)


def nonzero_mask(context: RequestContext, parameter: Parameter) -> Mask:
    """The mask of the elements that are not zero with the parameter's mask applied."""
    return _Nonzero(parameter, None).whole(context)


def _zeros_kept(context: RequestContext, parameter: Parameter) -> int:
    """Counts the elements that are 0 and that the mask keeps."""
    values, mask = parameter.weight.reshape(-1), parameter.mask
    backend = backend_for(values.device)
    within = [(0, len(values))] if parameter.scan is None else parameter.scan.zeros

    def count(span: tuple[int, int]) -> int:
        begin, end = span
        part = values[begin:end]
        if mask is None:
            return backend.count_zeros(part, None)
        kept = mask.part(begin, end)
        # `count_zeros` also counts pruned elements.
        return backend.count_zeros(part, kept) - (len(part) - backend.count_ones(kept))

    pieces = [
        (begin + first, begin + last)
        for begin, end in within
        for first, last in spans(min(end, len(values)) - begin, backend.piece)
    ]
    return sum(backend.map(context, count, pieces))


def _zero_slices(context: RequestContext, nonzero: _Nonzero, zeros: int) -> tuple[int, ...]:
    """For each dimension the number of slices that are wholly zero."""
    shape = nonzero.parameter.weight.shape
    if len(shape) < 2:
        return ()
    # In other dimensions there are fewer zeros than elements in a slice.
    least = [math.prod(shape) / size if size else 1 for size in shape]
    return tuple(
        _zero_slices_along(context, nonzero, dim) if 0 < zeros >= least[dim] else 0
        for dim in range(len(shape))
    )


def _zero_slices_along(context: RequestContext, nonzero: _Nonzero, dim: int) -> int:
    """The number of slices along `dim` that are wholly zero, in a large tensor."""
    shape, device = nonzero.parameter.weight.shape, nonzero.parameter.weight.device
    outer, size, inner = around(shape, dim)
    left = torch.arange(size, device=device)
    if inner <= SHORT:  # slices are close together, so their beginnings are read in one pass
        begins = (min(outer, CORNERS[0]), size, inner)
        left = left[~any_of_slices(context, nonzero.flags, begins, 1, device)]
    for corner in CORNERS:  # without slice pruning they exclude most slices, and often all
        left = left[~_any_nonzero(nonzero, dim, left, corner)]
        if not len(left):
            return 0
        if len(left) > shape[dim] // 8:
            break
    found = any_of_slices(context, nonzero.flags, shape, dim, device)
    return shape[dim] - int(found.count_nonzero())


# Tensors of at most this many elements are measured in one pass.
AT_ONCE = 1 << 20

# Elements of each slice that are read before all are.
CORNERS = (8, 64)

# The most consecutive elements of slices that are close together.
SHORT = 16


def _any_nonzero(nonzero: _Nonzero, dim: int, slices: Tensor, most: int) -> Tensor:
    """Whether each of some slices along `dim` has one of about `most` elements that is not zero."""
    weight = nonzero.parameter.weight
    side = math.ceil(most ** (1 / (weight.dim() - 1)))
    index = torch.zeros((), dtype=torch.int64, device=weight.device)
    for other, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        along = slices if other == dim else torch.arange(min(size, side), device=weight.device)
        index = index.unsqueeze(-1) + along * stride
    flags = nonzero.at(index).movedim(dim, 0).flatten(1)
    return backend_for(weight.device).any_along(flags.unsqueeze(0))
