"""Factorizations of large matrices in steps, so that a cancelled request soon ends.

A call of LAPACK cannot be interrupted: of 30,000 columns it would take minutes.
"""

import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.runtime.context import RequestContext

# Columns that LAPACK factorizes in one call.
_BLOCK = 2048
# Multiplications between two checks for cancellation: about a second of two cores.
_STEPS = 1 << 36
_LEAST_ROWS = 16


def cholesky(context: RequestContext, matrix: Tensor) -> int:
    """Replaces a symmetric matrix by its lower Cholesky factor.

    Args:
        context: The request.
        matrix: [n, n], written to.

    Returns:
        0; or the size of the first leading minor that is not positive.

    Raises:
        Cancelled: The request has been cancelled.
    """
    size = len(matrix)
    for begin, end in spans(size, _BLOCK):
        for first, last in _row_spans(begin, size, begin * (end - begin)):
            context.check()
            rows = matrix[first:last]
            rows[:, begin:end].addmm_(rows[:, :begin], matrix[begin:end, :begin].T, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(matrix[begin:end, begin:end])
        if failed:
            return begin + int(failed)
        matrix[begin:end, begin:end] = lower
        matrix[begin:end, end:] = 0
        for first, last in _row_spans(end, size, (end - begin) ** 2):
            context.check()
            below = matrix[first:last, begin:end]
            below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
    return 0


def cholesky_solve(context: RequestContext, lower: Tensor, rows: Tensor) -> Tensor:
    """Solves lower lower^T x = row for each row, in place.

    Raises:
        Cancelled: The request has been cancelled.
    """
    for first, last in _row_spans(0, len(rows), len(lower) ** 2):
        context.check()
        rows[first:last] = torch.cholesky_solve(rows[first:last].T, lower).T
    return rows


def product(context: RequestContext, rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns rows @ matrix.

    Raises:
        Cancelled: The request has been cancelled.
    """
    found = rows.new_empty(len(rows), matrix.shape[1])
    for first, last in _row_spans(0, len(rows), matrix.numel()):
        context.check()
        torch.mm(rows[first:last], matrix, out=found[first:last])
    return found


def _row_spans(begin: int, end: int, steps: int) -> list[tuple[int, int]]:
    """Divides rows that take so many steps each."""
    size = max(_LEAST_ROWS, _STEPS // max(1, steps))
    return [(begin + first, begin + last) for first, last in spans(max(0, end - begin), size)]
