"""Many small tensors side by side on the CPU: one operation works on all of them.

Each begins with a new byte of the masks' bits. What lies between two tensors counts as pruned.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import backend_for
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import Batch, Ints, Layouts, Piece, Scores
from secateur_server.runtime.context import RequestContext

# A tensor of more elements is not small: its own operations take longer than to call them.
SMALL = 1 << 16
# So few tensors are sooner taken one by one: an operation on arrays takes as long as some loops.
FEW = 48
# Elements of tensors that are side by side at once, which is a copy of them.
MOST = 1 << 20
# Tensors between two checks whether the request is to end: each takes some microseconds.
CHECKED = 1 << 11

_CPU = torch.device("cpu")


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
    scores: Sequence[Scores],
    units: Sequence[int],
    unpruned: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Batch:
    """A batch.

    Args:
        scores: Of each tensor, with a unit or more.
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


def _bits(scores: Scores, units: int, dtype: torch.dtype) -> Tensor:
    if (stored := scores.stored) is not None:
        return stored if stored.dtype == dtype else stored.to(dtype)
    return backend_for(_CPU).keys(Piece(units, scores, dtype, None)).view(dtype)


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


def cut_each(context: RequestContext, batch: Batch, counts: Ints) -> tuple[Tensor, Ints]:
    """As Backend.cut_each, with checks whether the request is cancelled."""
    backend = backend_for(_CPU)
    parts = [(part, counts[span]) for part, span in _parts(batch)]
    found = backend.map(context, lambda part: backend.cut_each(*part), parts)
    kept, cuts = zip(*found, strict=True)
    return torch.cat(kept), np.concatenate(cuts)


def _parts(batch: Batch) -> Iterator[tuple[Batch, slice]]:
    """Batches of CHECKED tensors, and which of all tensors they have."""
    for begin in range(0, len(batch.units), CHECKED):
        span = slice(begin, begin + CHECKED)
        begins = batch.begins[span]
        first, last = int(begins[0]), int(begins[-1] + (batch.units[span][-1] + 7) // 8 * 8)
        bits, unpruned = batch.bits[first:last], batch.unpruned[first // 8 : last // 8]
        yield Batch(bits, batch.dtype, unpruned, begins - first, batch.units[span]), span


def layout_each(
    context: RequestContext, bits: Tensor, begins: Ints, shapes: Sequence[Sequence[int]]
) -> Layouts:
    """As Backend.layouts, with checks whether the request is cancelled."""
    backend = backend_for(bits.device)
    parts = [slice(begin, begin + CHECKED) for begin in range(0, len(shapes), CHECKED)]
    found = backend.map(
        context, lambda part: backend.layouts(bits, begins[part], shapes[part]), parts
    )
    fields = ("ones", "nonzero_slices", "most_ones", "nonzero_blocks")
    return Layouts(*(np.concatenate([getattr(of, name) for of in found]) for name in fields))
