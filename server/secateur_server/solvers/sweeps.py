"""Triangular solves in which each row of the weight uses its own columns of a matrix.

For a row with the kept columns S, they solve with the lower or the upper triangle of matrix[S, S].
"""

from dataclasses import dataclass

from torch import Tensor

from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.eliminate import eliminate

# Columns that are eliminated one by one. Between blocks, products of matrices do the work.
_BLOCK = 64


@dataclass(frozen=True)
class Sweeps:
    """Solves with I + L and with I + L^T, in place, where the matrix is L + I + L^T.

    Attributes:
        context: The request.
        matrix: Float32, [columns, columns], symmetric, with ones on its diagonal.
        kept: Bool, [rows, columns]. Other elements of the solutions are 0.
    """

    context: RequestContext
    matrix: Tensor
    kept: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """Solves (I + L) x = values for each row x, from the first column on."""
        self._solve(values, 0, len(self.matrix), is_backward=False)
        return values

    def backward(self, values: Tensor) -> Tensor:
        """Solves (I + L^T) x = values for each row x, from the last column on."""
        self._solve(values, 0, len(self.matrix), is_backward=True)
        return values

    def _solve(self, values: Tensor, begin: int, end: int, is_backward: bool) -> None:
        """Solves for columns [begin, end): one half, its product with the matrix, the other."""
        if end - begin <= _BLOCK:
            return self._eliminate(values, begin, end, is_backward)
        self.context.check()
        blocks = -(-(end - begin) // _BLOCK)
        middle = begin + blocks // 2 * _BLOCK
        halves = (middle, end), (begin, middle)
        first, last = halves if is_backward else halves[::-1]
        self._solve(values, *first, is_backward)
        between = self.matrix[slice(*first), slice(*last)]
        values[:, slice(*last)].addmm_(values[:, slice(*first)], between, alpha=-1)
        return self._solve(values, *last, is_backward)

    def _eliminate(self, values: Tensor, begin: int, end: int, is_backward: bool) -> None:
        block, kept = values[:, begin:end], self.kept[:, begin:end]
        triangle = self.matrix[begin:end, begin:end]
        eliminate(block, kept, triangle, range(end - begin), is_backward)
        block.mul_(kept)
