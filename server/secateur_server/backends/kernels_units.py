"""Kernels for groups of elements, as those of kernels.py."""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled

# Up to so many keys a group it is sooner to compare them all than to sort them.
COUNTED = 128

# Keys that are compared at once: they stay in the first-level cache.
KEYS = 4096


@compiled
def largest(keys: Any, n: int, found: Any) -> None:
    """Writes which keys of each group are its `n` largest, of equal ones those further on.

    keys: integers, (groups, m, inner), contiguous.  found: bool, of that shape.
    """
    groups, m, inner = keys.shape
    flat, flags = keys.reshape(keys.size), found.reshape(keys.size)
    # The keys at one place of many groups lie side by side: so the compiler vectorizes.
    width = max(16, KEYS // m)
    columns, above = np.empty((m, width), keys.dtype), np.empty((m, width), np.int16)
    at = np.empty(width, np.int64)  # where each group begins
    begin, within = 0, 0
    for first in range(0, groups * inner, width):
        count = min(width, groups * inner - first)
        for i in range(count):
            at[i] = begin
            begin, within = begin + 1, within + 1
            if within == inner:
                begin, within = begin + (m - 1) * inner, 0
        for j in range(m):
            for i in range(count):
                columns[j, i] = flat[at[i] + j * inner]
        count_above(columns, count, above)
        for j in range(m):
            for i in range(count):
                flags[at[i] + j * inner] = above[j, i] < n


@compiled
def count_above(columns: Any, count: int, above: Any) -> None:
    """Writes how many keys of each of `count` columns are above each, or equal and further on."""
    above[:] = 0
    for j in range(len(columns)):
        for k in range(j + 1, len(columns)):
            for i in range(count):
                is_larger = columns[j, i] > columns[k, i]
                above[k, i] += is_larger
                above[j, i] += not is_larger


@compiled
def most_ones(lines: Any, most: Any) -> None:
    """Writes to `most` how many bits are 1 at most, of 2, 4, 8 and 16 side by side.

    lines: uint8, (lines, bytes).  most: uint8.
    """
    eights = np.zeros((lines.shape[1] + 1) // 2 * 2, np.uint8)
    by_two = eights.view(np.uint16)
    two, four, eight, sixteen = np.uint8(0), np.uint8(0), np.uint8(0), np.uint16(0)
    for row in range(len(lines)):
        line = lines[row]
        for i in range(len(line)):  # each line of it keeps to bytes, and so is vectorized
            byte = line[i]
            pairs = np.uint8(byte - np.uint8((byte >> 1) & 0x55))
            fours = np.uint8(np.uint8(pairs & 0x33) + np.uint8((pairs >> 2) & 0x33))
            eights[i] = np.uint8(fours & 0x0F) + np.uint8(fours >> 4)
            two |= np.uint8(pairs & 0xAA)
            four = max(four, max(np.uint8(fours & 0x0F), np.uint8(fours >> 4)))
            eight = max(eight, eights[i])
        for i in range(len(by_two)):
            sixteen = max(
                sixteen, np.uint16(np.uint16(by_two[i] & 0xFF) + np.uint16(by_two[i] >> 8))
            )
    most[0] = 2 if two else min(1, eight)
    most[1], most[2], most[3] = four, eight, sixteen


@compiled
def nonzero_blocks(lines: Any, counts: Any) -> None:
    """Adds to `counts` how many blocks, as high and as wide as 4, 8, 16 and 32 bits, have a 1.

    lines: as of most_ones.  counts: int64. At the edges blocks are smaller.
    """
    rows, width = lines.shape
    joined = np.zeros((4, -(-width // 4) * 4), np.uint8)  # the bits of 4, 8, 16 and 32 lines
    for first in range(0, rows, 4):
        for row in range(first, min(first + 4, rows)):
            join(lines[row], joined[0])
        for byte in joined[0]:
            counts[0] += ((byte & 0x0F) != 0) + ((byte & 0xF0) != 0)
        for step in range(1, 4):
            join(joined[step - 1], joined[step])
            joined[step - 1, :] = 0
            if (first + 4) % (4 << step) and first + 4 < rows:
                break
            if step == 1:
                counts[1] += np.count_nonzero(joined[1])
            elif step == 2:
                counts[2] += np.count_nonzero(joined[2].view(np.uint16))
            else:
                counts[3] += np.count_nonzero(joined[3].view(np.uint32))
                joined[3, :] = 0


@compiled
def join(line: Any, into: Any) -> None:
    """Adds the bits of a line to another."""
    for i in range(len(line)):
        into[i] |= line[i]


@compiled
def layout(bits: Any, shape: Any, slices: Any, most: Any, blocks: Any) -> None:
    """Writes the layout of a mask of few elements.

    bits: of the mask.  shape: int64, of one dimension or more.
    slices: int64, for each dimension.  most, blocks: as of most_ones and nonzero_blocks; no blocks
    under 2 dimensions.
    """
    flags = flags_of(bits)[: shape.prod()]
    outer = 1
    for dim in range(len(shape)):
        size = shape[dim]
        inner = len(flags) // (outer * size)
        slices[dim] = count_slices(flags, outer, size, inner)
        if dim == min(1, len(shape) - 1):
            lines = lines_of(bits, flags, outer, size, inner)
            most_ones(lines, most)
            if len(shape) > 1:
                matrix = lines if inner == 1 else lines_of(bits, flags, outer, size * inner, 1)
                nonzero_blocks(matrix, blocks)
        outer *= size


@compiled
def count_slices(flags: Any, outer: int, size: int, inner: int) -> int:
    """How many slices along the second of three dimensions have a flag."""
    found = np.zeros(size, np.uint8)
    for o in range(outer):
        block = flags[o * size * inner : (o + 1) * size * inner]
        if inner == 1:
            join(block, found)
        else:
            for s in range(size):
                if not found[s]:
                    found[s] = block[s * inner : (s + 1) * inner].any()
        if o % 16 == 0 and found.all():  # as mostly, of what was not pruned by slices
            break
    return int(np.count_nonzero(found))


@compiled
def flags_of(bits: Any) -> Any:
    """A byte, 0 or 1, for each bit."""
    flags = np.empty((len(bits), 8), np.uint8)
    for j in range(len(bits)):
        for place in range(8):
            flags[j, place] = (bits[j] >> place) & 1
    return flags.reshape(flags.size)


@compiled
def lines_of(bits: Any, flags: Any, outer: int, size: int, inner: int) -> Any:
    """As TorchBackend.lines.  flags: as of flags_of."""
    if inner == 1 and size % 8 == 0:
        return bits.reshape((outer, size // 8))
    lines = np.empty((outer * inner, (size + 7) // 8), np.uint8)
    for row in range(len(lines)):
        at = row // inner * size * inner + row % inner
        for j in range(lines.shape[1]):
            byte = 0
            if inner == 1 and 8 * j + 8 <= size:  # eight bits of two bytes
                first = bits[at >> 3] >> (at & 7)
                byte = first | (bits[min(at >> 3, len(bits) - 2) + 1] << (8 - (at & 7)))
                at += 8
            else:
                for place in range(min(8, size - 8 * j)):
                    byte |= flags[at] << place
                    at += inner
            lines[row, j] = byte
    return lines
