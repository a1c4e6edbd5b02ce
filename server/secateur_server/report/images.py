"""Images of which elements of a tensor are not zero: the whole, and the first elements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from secateur_server.backends import backend_for, spans
from secateur_server.backends.masks import Mask
from secateur_server.runtime.context import RequestContext

# Rows, and columns, of pixels of an image that shows many elements in a pixel.
SIDE = 192

# Pixels of an image that shows an element in each; and rows, or columns, of long ones.
PIXELS, LONGEST = 448 * 448, 4096


@dataclass(frozen=True)
class Image:
    """An image of the first rows and columns of a matrix.

    Row i of the pixels begins with row floor(i * rows / height) of the matrix; so do columns.

    Attributes:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        height: Rows of pixels.
        width: Columns of pixels.
        pixels: The pixels, row-major.
        are_bits: Whether a pixel is one element, and one bit: 1 is not zero, lowest bit first.
            Else it is a byte, the share of elements that are not zero: 0 is none, 255 is all.
    """

    rows: int
    columns: int
    height: int
    width: int
    pixels: bytes
    are_bits: bool


def images_of(context: RequestContext, mask: Mask, shape: Sequence[int]) -> list[Image]:
    """Makes the images of a tensor, from the whole to single elements.

    Args:
        context: The request.
        mask: Of the elements that are not zero.
        shape: The tensor's, of one dimension or more, with elements.
    """
    matrix = _matrix(shape)
    *coarse, single = _views(matrix)
    return [
        *(_shares(context, mask, matrix[1], view) for view in coarse),
        _single(mask, matrix[1], single),
    ]


def bytes_of_images(shape: Sequence[int]) -> int:
    """The bytes of the pixels of the images of a tensor."""
    *coarse, (rows, columns) = _views(_matrix(shape))
    return sum(min(SIDE, r) * min(SIDE, c) for r, c in coarse) + (rows * columns + 7) // 8


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of a tensor: its first dimension, and all others."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def _views(matrix: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows and columns that each image shows; the last one shows single elements."""
    rows, columns = matrix
    side = math.isqrt(PIXELS)
    height = min(rows, side)
    width = min(columns, PIXELS // height, LONGEST)
    height = min(rows, PIXELS // width, LONGEST)
    if (height, width) == matrix:
        return [matrix]
    # Half way, as factors, between a pixel of the whole and an element.
    middle = SIDE * math.isqrt(max(matrix) // SIDE)
    between = [(min(rows, middle), min(columns, middle))] if middle > max(height, width) else []
    return [matrix, *between, (height, width)]


def _shares(context: RequestContext, mask: Mask, stride: int, view: tuple[int, int]) -> Image:
    """An image of the first rows and columns of a matrix with `stride` columns."""
    rows, columns = view
    size = min(SIDE, rows), min(SIDE, columns)
    backend = backend_for(mask.bits.device)

    counts, lock = np.zeros(size, np.int64), Lock()

    def count(span: tuple[int, int]) -> None:
        found = np.zeros(size, np.int64)
        backend.count_pixels(mask.bits, *span, stride, rows, columns, found)
        with lock:  # the counts of all pieces would take more memory than the mask
            np.add(counts, found, out=counts)

    backend.map(context, count, spans(rows * columns, backend.piece))
    heights, widths = (
        np.diff(np.arange(pixels + 1) * length // pixels)
        for pixels, length in zip(size, view, strict=True)
    )
    totals = np.outer(heights, widths)
    shares = (2 * 255 * counts + totals) // (2 * totals)
    # Only what is wholly zero is 0, and only what has no zero is 255.
    shares = np.clip(shares, np.where(counts > 0, 1, 0), np.where(counts < totals, 254, 255))
    return Image(rows, columns, *size, shares.astype(np.uint8).tobytes(), are_bits=False)


def _single(mask: Mask, stride: int, view: tuple[int, int]) -> Image:
    """An image with a pixel for each element."""
    rows, columns = (torch.arange(length, device=mask.bits.device) for length in view)
    flags = mask.at(rows.unsqueeze(1) * stride + columns)
    bits = backend_for(flags.device).pack(flags.view(-1)).cpu().numpy()
    return Image(*view, *view, bits.tobytes(), are_bits=True)
