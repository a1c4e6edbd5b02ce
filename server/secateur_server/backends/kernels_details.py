"""Kernels for the details of reports, as those of kernels.py."""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import BLOCK, compiled

# How many bits of each byte are 1.
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


@compiled
def count_magnitudes(values: Any, kept: Any, largest: float, counts: Any) -> None:
    """Adds values to histograms of their magnitudes.

    values: float32 or float64, 1-D.  kept: the bits of a mask; empty if all are kept.
    counts: int64, (2, bins + 2), as of Backend.count_magnitudes; added to.
    """
    bins, flat = counts.shape[1] - 2, counts.reshape(counts.size)
    divisor = largest if largest > 0 else 1.0  # numba raises where numpy makes NaN
    places = np.empty(BLOCK, np.int16)
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        for i in range(len(block)):  # loops of their own: they are vectorized
            x = abs(np.float64(block[i]))
            is_finite = x <= largest
            place = min(np.int16((x if is_finite else 0.0) / divisor * bins), bins - 1) + 1
            places[i] = (0 if x == 0 else place) if is_finite else bins + 1
        if len(kept):
            for i in range(len(block)):
                bit = (kept[(begin + i) >> 3] >> (i & 7)) & 1
                places[i] += (1 - np.int16(bit)) * np.int16(bins + 2)
        for i in range(len(block)):
            flat[places[i]] += 1


@compiled
def count_pixels(
    bits: Any, begin: int, end: int, stride: int, rows: int, edges: Any, counts: Any
) -> None:
    """Adds to `counts` how many bits are 1 in each pixel of an image, as Backend.count_pixels.

    edges: where each column of pixels begins, and the columns of the image.
    """
    height, columns = len(counts), edges[-1]
    while begin < end:
        row = begin // columns
        column = begin - row * columns
        stop = min(columns, column + end - begin)
        begin += stop - column
        line = counts[((row + 1) * height - 1) // rows]
        pixel = np.searchsorted(edges, column, side="right") - 1
        while column < stop:
            last = min(stop, edges[pixel + 1])
            line[pixel] += _ones_between(bits, row * stride + column, row * stride + last)
            column = last
            pixel += 1


@compiled
def _ones_between(bits: Any, begin: int, end: int) -> int:
    """How many of the bits [begin, end) are 1."""
    first, last = begin >> 3, (end - 1) >> 3
    head, tail = 0xFF << (begin & 7), 0xFF >> (7 - ((end - 1) & 7))
    if first == last:
        return int(_ONES[bits[first] & head & tail])
    count = _ONES[bits[first] & head & 0xFF] + _ONES[bits[last] & tail]
    for i in range(first + 1, last):
        count += _ONES[bits[i]]
    return int(count)
