"""The kernel of the solvers, as those of kernels.py: elimination within a block of columns.

Each row of a weight skips other columns, so no product of matrices does this.
"""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled

# Rows that are eliminated at once: neighbours in memory, so that the compiler vectorizes over them.
TILE = 64


@compiled
def eliminate(values: Any, active: Any, triangle: Any, first: int, last: int, step: int) -> None:
    """Subtracts active columns from those that follow, one after another.

    values: float32, (rows, columns), written to; rows may lie apart.
    active: bool, the same shape: which elements are subtracted.
    triangle: float32, (columns, columns), contiguous: how much of the one column is subtracted
        from the other.
    first, last: the columns that are subtracted, [first, last).
    step: 1 goes from the first to the last, and changes those after; -1 goes the other way.
    """
    rows, columns = values.shape
    tile = np.zeros((columns, TILE), values.dtype)
    factor = np.zeros(TILE, values.dtype)
    low, high = (first, columns) if step > 0 else (0, last)  # what is read or changed
    for top in range(0, rows, TILE):
        height = min(TILE, rows - top)
        for r in range(height):
            for j in range(low, high):
                tile[j, r] = values[top + r, j]
        for k in range(last - first):
            i = first + k if step > 0 else last - 1 - k
            for r in range(height):
                factor[r] = tile[i, r] if active[top + r, i] else np.float32(0)
            begin, end = (i + 1, high) if step > 0 else (low, i)
            for j in range(begin, end):
                share = triangle[i, j]
                for r in range(TILE):
                    tile[j, r] -= factor[r] * share
        for r in range(height):
            for j in range(low, high):
                values[top + r, j] = tile[j, r]
