"""Kernels that look for many cuts at once, as those of kernels.py.

Where a key belongs among the sorted prefixes, or cuts, is looked up by its highest bits, its head:
first[head] is the first one with that head, and few share it; where none has it, it is ~j of the
first one above. So many cost little more than one.

wanted: ascending; behind them one more that no key exceeds.
head: the place of the lowest bit of a head.
"""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled, is_unpruned


@compiled
def count_many_digits(
    bits: Any,
    unpruned: Any,
    largest: int,
    wanted: Any,
    first: Any,
    head: int,
    shift: int,
    width: int,
    counts: Any,
) -> None:
    """Adds to the row of each wanted prefix the digits at `shift` of the keys that have it.

    width: bits of a digit.  counts: (prefixes, 2^width).
    """
    low = (1 << width) - 1
    for i in range(len(bits)):
        key = bits.dtype.type(bits[i] & largest)
        row = first[key >> head]
        if row >= 0 and is_unpruned(unpruned, i):
            prefix = key >> (shift + width)
            while wanted[row] < prefix:
                row += 1
            if wanted[row] == prefix:
                counts[row, (key >> shift) & low] += 1


@compiled
def count_below(bits: Any, unpruned: Any, largest: int, cut: int) -> tuple[int, int]:
    """How many keys are below the cut, and how many are the cut."""
    below, equal = 0, 0
    for i in range(len(bits)):
        key, candidates = bits.dtype.type(bits[i] & largest), is_unpruned(unpruned, i)
        below += (key < cut) & candidates
        equal += (key == cut) & candidates
    return below, equal


@compiled
def sum_squares(
    bits: Any,
    unpruned: Any,
    largest: int,
    values: Any,
    wanted: Any,
    first: Any,
    head: int,
    sums: Any,
    counts: Any,
) -> None:
    """Adds squares of values to `sums`, in their order, and 1 for each to `counts`.

    wanted: cuts.
    sums: at 2j of what has a key between cut j - 1 and cut j, at 2j + 1 of what is at cut j.
    """
    for i in range(len(bits)):
        if is_unpruned(unpruned, i):
            key = bits.dtype.type(bits[i] & largest)
            at, value = first[key >> head], np.float64(values[i])
            if at < 0:
                at = ~at
            else:
                while wanted[at] < key:
                    at += 1
                if wanted[at] == key:
                    counts[2 * at + 1] += 1
                    sums[2 * at + 1] += value * value
                    continue
            counts[2 * at] += 1
            sums[2 * at] += value * value
