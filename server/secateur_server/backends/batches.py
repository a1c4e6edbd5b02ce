"""Many small tensors side by side on the CPU: one operation works on all of them.

Each begins with a new byte of the masks' bits. What lies between two tensors is not alive.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur_server.backends import backend_for, kernels, kernels_many
from secateur_server.backends.keys import BITS
from secateur_server.backends.protocol import Layout, Piece
from secateur_server.backends.randomness import RandomScores, random_keys
from secateur_server.runtime.context import RequestContext

Ints = npt.NDArray[np.int64]

# A tensor of more elements is not small: its own passes take longer than to call them.
SMALL = 1 << 16
# So few tensors are sooner taken one by one: an operation on arrays takes as long as some loops.
FEW = 48
# Elements of tensors that are side by side at once, which is a copy of them.
MOST = 1 << 20
# Tensors between two checks whether the request is to end: each takes some microseconds.
CHECKED = 1 << 11

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Units of small tensors.

    Attributes:
        bits: The integers that have the bits of their scores, or random ones; 1-D.
        dtype: What the scores are compared as.
        unpruned: uint8: a bit for each unit, 0 is pruned already.
        begins: Where each tensor begins in `bits`, a multiple of 8.
        units: Of each tensor.
    """

    bits: Tensor
    dtype: torch.dtype
    unpruned: Tensor
    begins: Ints
    units: Ints

    def spans(self) -> Iterator[slice]:
        """The tensors, as many at once as take a moment."""
        for begin in range(0, len(self.units), CHECKED):
            yield slice(begin, begin + CHECKED)


def are_many(tensors: Sequence[object]) -> bool:
    """Whether to take small tensors side by side is faster than one by one."""
    return len(tensors) > FEW


def batched(sizes: Sequence[int]) -> Iterator[slice]:
    """Ranges of tensors of these sizes that are side by side at once."""
    begin = elements = 0
    for index, size in enumerate(sizes):
        if elements and elements + size > MOST:
            yield slice(begin, index)
            begin, elements = index, 0
        elements += size
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def side_by_side(
    scores: Sequence[Tensor | RandomScores],
    units: Sequence[int],
    unpruned: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Batch:
    """A batch.

    Args:
        scores: Of each tensor, 1-D, with a unit or more.
        units: Of each tensor.
        unpruned: Of each tensor bits; None: nothing of it is pruned.
        dtype: As of score_dtype.
    """
    sizes = np.array(units, np.int64)
    ends = np.cumsum((sizes + 7) // 8 * 8)
    begins = ends - (sizes + 7) // 8 * 8
    parts = [_bits(of, count, dtype) for of, count in zip(scores, units, strict=True)]
    bits = padded(parts, units).view(BITS[dtype])
    return Batch(bits, dtype, bits_of(unpruned, units), begins, sizes)


def _bits(scores: Tensor | RandomScores, units: int, dtype: torch.dtype) -> Tensor:
    if isinstance(scores, Tensor):
        return scores if scores.dtype == dtype else scores.to(dtype)
    if not kernels.enabled:
        return random_keys(scores, torch.arange(units)).view(dtype)
    bits = torch.empty(units, dtype=BITS[dtype])
    kernels.random_bits(scores.state, scores.begin, bits.numpy())
    return bits.view(dtype)


def padded(parts: Sequence[Tensor], units: Sequence[int]) -> Tensor:
    """The parts, 1-D and of one dtype, each followed by zeros up to a multiple of 8."""
    dtype = parts[0].dtype
    if any(count % 8 for count in units):
        zeros = torch.zeros(8, dtype=dtype)
        gaps = [zeros[: -count % 8] for count in units]
        parts = list(itertools.chain.from_iterable(zip(parts, gaps, strict=True)))
    return torch.cat(list(parts))


def bits_of(masks: Sequence[Tensor | None], units: Sequence[int]) -> Tensor:
    """The bits of all masks, one behind another; all 1 of a tensor that has none."""
    whole: dict[int, Tensor] = {}
    parts = []
    for mask, count in zip(masks, units, strict=True):
        if mask is None:
            if count not in whole:
                whole[count] = _ones(count)
            mask = whole[count]
        parts.append(mask)
    return torch.cat(parts)


def _ones(count: int) -> Tensor:
    bits = torch.full(((count + 7) // 8,), 0xFF, dtype=torch.uint8)
    if count % 8:
        bits[-1] = (1 << count % 8) - 1
    return bits


def cut_each(
    context: RequestContext, batch: Batch, counts: Ints
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Takes the lowest `counts` units of each tensor, ties by their order.

    Returns:
        The bits of what stays; and of each tensor the key of the cut, how many units at it are
        pruned, and of how many: -1, 0, 0 where none is.
    """
    kept, cuts = torch.empty_like(batch.unpruned), np.empty((len(counts), 3), np.int64)

    def cut(part: slice) -> None:
        if kernels.enabled:
            of = batch.begins[part], batch.units[part], counts[part]
            bits: Any = batch.bits.numpy()
            largest = bits.dtype.type(np.iinfo(bits.dtype).max)
            into = kept.numpy(), cuts[part]
            kernels_many.cut_each(bits, batch.unpruned.numpy(), largest, *of, *into)
        else:
            for index in range(*part.indices(len(counts))):
                cuts[index] = _cut(context, batch, index, int(counts[index]), kept)

    backend_for(_CPU).map(context, cut, list(batch.spans()))
    return kept, cuts


def _cut(
    context: RequestContext, batch: Batch, index: int, count: int, kept: Tensor
) -> tuple[int, int, int]:
    begin, units = int(batch.begins[index]), int(batch.units[index])
    within = slice(begin // 8, (begin + units + 7) // 8)
    if not count:
        kept[within] = batch.unpruned[within]
        return -1, 0, 0
    scores = batch.bits[begin : begin + units].view(batch.dtype)
    piece = Piece(units, scores, batch.dtype, batch.unpruned[within])
    cut = backend_for(_CPU).cut_few(context, [piece], count, [kept[within]])
    return cut.key, cut.ties, cut.equal


@dataclass(frozen=True)
class Layouts:
    """Where the ones of masks lie.

    Attributes:
        ones: How many each mask has.
        nonzero_slices: As of Layout, of all masks, one behind another.
        most_ones, nonzero_blocks: As of Layout, (masks, 4); all blocks are 0 under 2 dimensions.
    """

    ones: Ints
    nonzero_slices: Ints
    most_ones: npt.NDArray[np.uint8]
    nonzero_blocks: Ints


def layout_each(
    context: RequestContext, bits: Tensor, begins: Ints, shapes: Sequence[Sequence[int]]
) -> Layouts:
    """The layouts of masks of one dimension or more, with elements.

    Args:
        context: Of the request.
        bits: Of all masks.
        begins: The element at which each begins, a multiple of 8.
        shapes: Of each mask.
    """
    dims = np.array([len(shape) for shape in shapes], np.int64)
    ends = np.cumsum(dims)
    sizes = np.array(list(itertools.chain.from_iterable(shapes)), np.int64)
    found = Layouts(
        np.empty(len(shapes), np.int64),
        np.empty(len(sizes), np.int64),
        np.empty((len(shapes), 4), np.uint8),
        np.zeros((len(shapes), 4), np.int64),
    )

    def look(part: slice) -> None:
        of = slice(int(ends[part.start] - dims[part.start]), int(ends[part][-1]))
        if kernels.enabled:
            into = found.ones[part], found.nonzero_slices[of], found.most_ones[part]
            kernels_many.layout_each(
                bits.numpy(), begins[part], sizes[of], dims[part], *into, found.nonzero_blocks[part]
            )
        else:
            for index in range(*part.indices(len(shapes))):
                _look(bits, int(begins[index]), shapes[index], found, index, int(ends[index]))

    parts = [slice(begin, begin + CHECKED) for begin in range(0, len(shapes), CHECKED)]
    backend_for(_CPU).map(context, look, parts)
    return found


def _look(
    bits: Tensor, begin: int, shape: Sequence[int], found: Layouts, index: int, end: int
) -> None:
    backend, size = backend_for(_CPU), (int(np.prod(shape)) + 7) // 8
    part = bits[begin // 8 : begin // 8 + size]
    layout: Layout = backend.layout(part, shape)
    found.ones[index] = backend.count_ones(part)
    found.nonzero_slices[end - len(shape) : end] = layout.nonzero_slices
    found.most_ones[index] = layout.most_ones
    if layout.nonzero_blocks:
        found.nonzero_blocks[index] = layout.nonzero_blocks
