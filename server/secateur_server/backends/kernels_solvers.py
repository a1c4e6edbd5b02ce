"""The kernel of the solvers, as those of kernels.py: elimination within a block of columns.

Each row of a weight skips other columns, so no product of matrices does this.
"""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled


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
    row = np.empty(columns, values.dtype)  # contiguous, and no alias: so the compiler vectorizes
    for r in range(rows):
        row[:] = values[r]
        for k in range(last - first):
            i = first + k if step > 0 else last - 1 - k
            if not active[r, i]:
                continue
            factor = row[i]
            begin, end = (i + 1, columns) if step > 0 else (0, i)
            for j in range(begin, end):
                row[j] -= factor * triangle[i, j]
        values[r] = row
