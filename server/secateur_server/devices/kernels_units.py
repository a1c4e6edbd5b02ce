"""The passes over groups of elements on a CPU, compiled as those of kernels.py."""

from typing import Any

import numpy as np

from secateur_server.devices.kernels import _compiled

# Up to so many keys a group it is sooner to compare them all than to sort them.
COUNTED = 128

# Keys that are compared at once: they stay in the first-level cache.
KEYS = 4096


@_compiled
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


@_compiled
def count_above(columns: Any, count: int, above: Any) -> None:
    """Writes how many keys of each of `count` columns are above each, or equal and further on."""
    above[:] = 0
    for j in range(len(columns)):
        for k in range(j + 1, len(columns)):
            for i in range(count):
                is_larger = columns[j, i] > columns[k, i]
                above[k, i] += is_larger
                above[j, i] += not is_larger
