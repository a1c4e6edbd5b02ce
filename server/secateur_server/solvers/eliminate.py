"""Elimination within a block of columns, where each row skips other columns."""

import torch
from torch import Tensor

from secateur_server.backends import has_kernels


def eliminate(
    values: Tensor,
    active: Tensor,
    triangle: Tensor,
    sources: range,
    is_backward: bool = False,
) -> None:
    """Subtracts columns of a block from those that follow, one after another.

    For each i of `sources` in turn, and each later j: values[r, j] -= values[r, i] * triangle[i, j]
    in the rows r where i is active. Those before i never change any more, nor does i.

    Args:
        values: Float32, [rows, columns], changed in place.
        active: Bool, the same shape.
        triangle: Float32, [columns, columns]. Only elements above the diagonal are read; those
            below it, if backward.
        sources: Consecutive columns.
        is_backward: From the last to the first: "later" is then to the left.
    """
    if values.device.type != "cpu" or not has_kernels():
        return _by_columns(values, active, triangle, sources, is_backward)
    from secateur_server.backends import kernels_solvers  # numba takes 0.4 s to import

    step = -1 if is_backward else 1
    arrays = values.numpy(), active.numpy(), triangle.contiguous().numpy()
    kernels_solvers.eliminate(*arrays, sources.start, sources.stop, step)
    return None


def _by_columns(
    values: Tensor, active: Tensor, triangle: Tensor, sources: range, is_backward: bool
) -> None:
    for i in reversed(sources) if is_backward else sources:
        later = slice(0, i) if is_backward else slice(i + 1, None)
        factors = torch.where(active[:, i], values[:, i], 0.0)
        values[:, later] -= factors.unsqueeze(1) * triangle[i, later]
