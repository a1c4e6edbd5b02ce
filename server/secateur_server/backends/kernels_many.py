"""Kernels for many small tensors at once, as those of kernels.py.

A call from Python takes as long as hundreds of units do: one call works on all of them.

bits, unpruned, kept: of all tensors side by side, each from a new byte of a mask on.
begins, units: int64, of each tensor; begins are multiples of 8.
"""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled, count_ones, cut_few
from secateur_server.backends.kernels_units import layout


@compiled
def cut_each(
    bits: Any,
    unpruned: Any,
    largest: int,
    begins: Any,
    units: Any,
    counts: Any,
    kept: Any,
    cuts: Any,
) -> None:
    """As cut_few, of each tensor by itself.

    counts: int64, of the units to prune of each.
    cuts: int64, (tensors, 3), written to: what cut_few returns; -1, 0, 0 where nothing is pruned.
    """
    found, at = np.empty(units.max(), bits.dtype), np.empty(units.max(), np.int32)
    for t in range(len(units)):
        begin, end = begins[t], begins[t] + units[t]
        first, last = begin >> 3, (end + 7) >> 3
        candidates, into = unpruned[first:last], kept[first:last]
        if counts[t] > 0:
            cut = cut_few(bits[begin:end], candidates, largest, counts[t], into, found, at)
            cuts[t, 0], cuts[t, 1], cuts[t, 2] = cut
        else:
            into[:] = candidates
            cuts[t, 0], cuts[t, 1], cuts[t, 2] = -1, 0, 0


@compiled
def layout_each(
    bits: Any, begins: Any, shapes: Any, dims: Any, ones: Any, slices: Any, most: Any, blocks: Any
) -> None:
    """As layout, of each mask.

    shapes: int64, of all masks one behind another; `dims` numbers of each, 1 or more.
    ones: int64, written to: how many bits of each are 1.
    slices: int64, as long as shapes.  most: uint8, blocks: int64; (masks, 4).
    """
    end = 0
    for t in range(len(begins)):
        first, end = end, end + dims[t]
        shape = shapes[first:end]
        begin = begins[t] >> 3
        part = bits[begin : begin + ((shape.prod() + 7) >> 3)]
        ones[t] = count_ones(part)
        layout(part, shape, slices[first:end], most[t], blocks[t])
