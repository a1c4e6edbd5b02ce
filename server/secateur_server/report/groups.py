"""Counts how full groups of elements are: how regular N:M patterns are."""

from collections.abc import Sequence

import numpy as np
import torch

from secateur_server.backends import backend_for
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Ints, around
from secateur_server.granularity.tiles import Box, Tiles
from secateur_server.report.structure import GROUPS, lines_of
from secateur_server.runtime.context import RequestContext

# How many of its bits are 1, for each byte.
_ONES = np.array([byte.bit_count() for byte in range(256)])


def count_groups(
    context: RequestContext, mask: Mask | None, shape: Sequence[int]
) -> dict[int, Ints]:
    """Counts the groups along the second dimension, or the only one, by their nonzero elements.

    Args:
        context: The request.
        mask: Of the elements that are not zero; None: all.
        shape: The tensor's, of one dimension or more, with elements.

    Returns:
        For each m of GROUPS m + 1 counts: at n, groups of m in which n elements are not zero. The
        last group of a line is filled with zeros.
    """
    outer, size, inner = around(shape, min(1, len(shape) - 1))
    lines = outer * inner
    if mask is None:
        return {m: _full(lines, size, m) for m in GROUPS}
    backend = backend_for(mask.bits.device)
    tiles = Tiles((outer, size, inner), (1, GROUPS[-1], 1))

    def count(box: Box) -> Ints:
        return _of_bytes(lines_of(mask, tiles, box))

    parts = backend.map(context, count, tiles.boxes(backend.piece))
    by_byte, by_two = np.split(np.sum(parts, axis=0), [256])
    found = {m: _in_bytes(by_byte, m) for m in GROUPS[:-1]} | {GROUPS[-1]: by_two}
    for m, counts in found.items():  # the bytes are padded with groups that do not exist
        counts[0] = lines * -(-size // m) - counts[1:].sum()
    return found


def _full(lines: int, size: int, m: int) -> Ints:
    """The counts of lines without zeros."""
    counts = np.zeros(m + 1, np.int64)
    counts[m] = lines * (size // m)
    counts[size % m] += lines * (size % m > 0)
    return counts


def _of_bytes(lines: torch.Tensor) -> Ints:
    """Counts the bytes of lines by their values, and their pairs by how many bits are 1."""
    padded = torch.nn.functional.pad(lines, (0, lines.shape[1] % 2))
    ones = torch.from_numpy(_ONES).to(lines.device)[padded.int()]
    by_two = ones.reshape(-1, 2).sum(1)
    counts = torch.bincount(padded.reshape(-1), minlength=256), torch.bincount(by_two, minlength=17)
    return torch.cat(counts).cpu().numpy()


def _in_bytes(by_byte: Ints, m: int) -> Ints:
    """Counts the groups of m = 2, 4 or 8 in bytes."""
    counts = np.zeros(m + 1, np.int64)
    for shift in range(0, 8, m):
        ones = _ONES[(np.arange(256) >> shift) & ((1 << m) - 1)]
        np.add.at(counts, ones, by_byte)
    return counts
