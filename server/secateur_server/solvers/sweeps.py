"""Triangular solves in which each row of the weight uses its own columns of a matrix.

For a row with the kept columns S, they solve with the lower or the upper triangle of matrix[S, S].
"""

from dataclasses import dataclass

from torch import Tensor

from secateur_server.backends import spans
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
        for begin, end in spans(len(self.matrix), _BLOCK):
            self._solve(values, begin, end, slice(0, begin), is_backward=False)
        return values

    def backward(self, values: Tensor) -> Tensor:
        """Solves (I + L^T) x = values for each row x, from the last column on."""
        for begin, end in reversed(spans(len(self.matrix), _BLOCK)):
            self._solve(values, begin, end, slice(end, None), is_backward=True)
        return values

    def _solve(
        self, values: Tensor, begin: int, end: int, solved: slice, is_backward: bool
    ) -> None:
        self.context.check()
        block, kept = values[:, begin:end], self.kept[:, begin:end]
        block.addmm_(values[:, solved], self.matrix[solved, begin:end], alpha=-1)
        triangle = self.matrix[begin:end, begin:end]
        eliminate(block, kept, triangle, range(end - begin), is_backward)
        block.mul_(kept)
