"""Finds N:M patterns, and counts blocks that are wholly zero.

All of this is read from masks of the elements that are not zero, in which a line of elements is
bytes: a group of 16 is two bytes, and a block of 4 x 4 is half a byte of each of four lines.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends import backend_for
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Layouts, around
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.runtime.context import RequestContext

GROUPS = (2, 4, 8, 16)
SIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class ZeroBlocks:
    """The blocks of side x side elements that are wholly zero, and how many blocks there are."""

    side: int
    zero: int
    total: int


@dataclass(frozen=True)
class Structure:
    """The arrangement of the zeros of a tensor. Elements beyond an edge count as zero.

    Attributes:
        patterns: (n, m) with n < m, for each m of GROUPS: at most n of m consecutive elements along
            the second dimension are not zero. Tensors of one dimension use the first.
        zero_blocks: The zero blocks of the tensor as a matrix of its first dimension and all
            others, for SIDES up to the last that has any. Empty under 2 dimensions.
    """

    patterns: tuple[tuple[int, int], ...]
    zero_blocks: tuple[ZeroBlocks, ...]


def structure_of_few(shape: Sequence[int], layouts: Layouts) -> Structure:
    """The structure of a tensor of one dimension or more, with elements.

    Args:
        shape: The shape of the tensor.
        layouts: The layouts of one mask: of the elements that are not zero.
    """
    most = zip(layouts.most_ones[0].tolist(), GROUPS, strict=True)
    matrix = (shape[0], math.prod(shape[1:]))
    blocks = _zero_of(matrix, layouts.nonzero_blocks[0].tolist()) if len(shape) > 1 else ()
    return Structure(tuple((n, m) for n, m in most if n < m), blocks)


def structure_of(
    context: RequestContext, shape: Sequence[int], zeros: int, nonzero: Callable[[], Mask]
) -> Structure:
    """The structure of a tensor. A tensor without elements has neither patterns nor blocks.

    Args:
        context: The request.
        shape: The shape of the tensor.
        zeros: The number of elements that are zero.
        nonzero: Makes the mask of the others. Called only if counts do not settle everything.
    """
    total = math.prod(shape)
    if not shape or not total:
        return Structure((), ())
    sizes = around(shape, min(1, len(shape) - 1))
    matrix = (shape[0], total // shape[0])
    most = {m: min(m, sizes[1]) for m in GROUPS}
    unsettled = {m: most[m] for m in GROUPS if zeros >= _whole_groups(sizes, m)}
    # The block in the last corner is the smallest.
    may_have_blocks = len(shape) > 1 and zeros >= math.prod((n - 1) % 4 + 1 for n in matrix)
    blocks: tuple[ZeroBlocks, ...] = ()
    if unsettled or may_have_blocks:
        mask = nonzero()
        most |= _most_nonzero(context, mask, sizes, unsettled)
        blocks = _zero_blocks(context, mask, matrix) if may_have_blocks else ()
    return Structure(tuple((n, m) for m, n in most.items() if n < m), blocks)


def _whole_groups(sizes: tuple[int, int, int], m: int) -> int:
    """The number of groups of full size. With fewer zeros, one of them has none."""
    outer, size, inner = sizes
    return outer * max(1, size // m) * inner


def _most_nonzero(
    context: RequestContext, mask: Mask, sizes: tuple[int, int, int], limits: dict[int, int]
) -> dict[int, int]:
    """The most elements of a group that are not zero, for each m of `limits`.

    `sizes` are the elements before, along and after the dimension, and `limits` the upper bounds.
    """
    if not limits:
        return {}
    backend = backend_for(mask.bits.device)
    tiles = Tiles(sizes, (1, GROUPS[-1], 1))
    met: set[int] = set()

    def most_in(box: Box) -> dict[int, int]:
        if len(met) == len(limits):  # all limits are reached
            return limits
        found = dict(zip(GROUPS, backend.most_ones(lines_of(mask, tiles, box)), strict=True))
        met.update(m for m in limits if found[m] == limits[m])
        return found

    found = backend.map(context, most_in, tiles.boxes(backend.piece))
    return {m: max(most[m] for most in found) for m in limits}


def _zero_blocks(
    context: RequestContext, mask: Mask, matrix: tuple[int, int]
) -> tuple[ZeroBlocks, ...]:
    """The blocks of a matrix, for each side up to the last that has any."""
    backend = backend_for(mask.bits.device)
    rows, columns = matrix
    tiles = Tiles((rows, columns, 1), (min(rows, SIDES[-1]), SIDES[-1], 1))

    def nonzero_in(box: Box) -> list[int]:
        return backend.nonzero_blocks(lines_of(mask, tiles, box))

    counts = backend.map(context, nonzero_in, tiles.boxes(backend.piece))
    return _zero_of(matrix, map(sum, zip(*counts, strict=True)))


def _zero_of(matrix: tuple[int, int], nonzero: Iterable[int]) -> tuple[ZeroBlocks, ...]:
    """The blocks of a matrix, from the number of blocks of each side that are not zero."""
    rows, columns = matrix
    found = []
    for side, count in zip(SIDES, nonzero, strict=True):
        total = -(-rows // side) * -(-columns // side)
        if count == total:
            break
        found.append(ZeroBlocks(side, total - count, total))
    return tuple(found)


def lines_of(mask: Mask, tiles: Tiles, box: Box) -> Tensor:
    """A box of a mask, with bytes of its own for each line along the second of three dimensions.

    The result is uint8, (lines, bytes), with 0 for padding.
    """
    outer, size, inner = tiles.sizes
    (first, last), (begin, end), _ = spans = _elements(tiles, box)
    if inner == 1 and size % 8 == 0:
        return mask.bits.view(outer, size // 8)[first:last, begin // 8 : end // 8]
    flags = _flags(mask, tiles.sizes, spans).movedim(1, 2).flatten(0, 1)
    return backend_for(flags.device).pack(flags)


def _elements(tiles: Tiles, box: Box) -> Box:
    """The elements [begin, end) of a box in each dimension."""
    along = zip(box, tiles.lengths, tiles.sizes, strict=True)
    return tuple((first * n, min(last * n, size)) for (first, last), n, size in along)


def _flags(mask: Mask, sizes: tuple[int, ...], spans: Box) -> Tensor:
    """The elements of a box as bool, in its shape."""
    runs, block = [(0, 1)], 1  # of the box, in a block of the dimensions so far
    for size, (first, last) in zip(reversed(sizes), reversed(spans), strict=True):
        if runs == [(0, block)]:
            runs = [(first * block, last * block)]
        else:
            runs = [(i * block + b, i * block + e) for i in range(first, last) for b, e in runs]
        block *= size
    shape = tuple(last - first for first, last in spans)
    return torch.cat([mask.flags(*run) for run in runs]).view(shape)
