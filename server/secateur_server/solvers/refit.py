"""The best values of the kept weights for a mask."""

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.cores import all_cores
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.factor import cholesky, cholesky_solve
from secateur_server.solvers.gram import damped, not_semidefinite
from secateur_server.solvers.rows import map_rows
from secateur_server.solvers.sweeps import Sweeps

# The iteration ends when a step lowers the error by less than this share of it.
TOLERANCE = 1e-3

# Rayleigh quotients of a matrix with ones on its diagonal. Below _FLAT rounding decides, so a row
# does not move; below _NEGATIVE rounding cannot be the reason.
_FLAT = 1e-6
_NEGATIVE = -1e-2

# Rows of the Gram matrix that are selected at once.
_LINES = 1024
# Columns of a product of matrices between two checks for cancellation.
_COLUMNS = 4096


def refit(
    context: RequestContext,
    target: Tensor,
    start: Tensor,
    kept: Tensor,
    gram: Tensor,
    damping: float = 1e-4,
    steps: int = 10,
    field: str = "gram",
) -> Tensor:
    """Minimizes (w - target) (G + d I) (w - target)^T for each row w that is 0 where not kept.

    The damping d pulls the kept weights towards the target, so those of dead columns become the
    target's. If few distinct rows of the mask exist, as in structured masks, a Cholesky
    factorization of each one gives the minimum. Otherwise conjugate gradients begin at `start`, and
    no step raises what is minimized. Memory beside the result: the Gram matrix twice, and for each
    core seven copies of 256 rows.

    Args:
        context: The request.
        target: [rows, columns], of any floating dtype: the weight before any pruning.
        start: The same shape: the weight from which the iteration begins.
        kept: Bool, the same shape.
        gram: Float32, [columns, columns]: X^T X of the inputs, of any scale.
        damping: What is added to the diagonal, relative to its mean.
        steps: Of the iteration, at most. It ends earlier when a step gains less than 0.1 %.
        field: The path of the Gram matrix in the request, for errors.

    Returns:
        Float32, the same shape, 0 where not kept.

    Raises:
        InvalidGram: The matrix is not positive semidefinite. Both ways find gross cases only: a
            pivot or a curvature that is negative.
        Cancelled: The request has been cancelled.
    """
    patterns = _patterns(kept)
    matrix = damped(gram, damping)
    if _direct_cost(kept, patterns) <= 2 * steps * kept.numel() * len(gram):
        with all_cores():
            return _solve_patterns(context, target, kept, matrix, patterns, field)
    scale = matrix.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    matrix.div_(scale).div_(scale.unsqueeze(1)).fill_diagonal_(1.0)
    found = torch.empty(target.shape, dtype=torch.float32, device=target.device)

    def solve(target: Tensor, start: Tensor, kept: Tensor, found: Tensor) -> None:
        goal, begin = (part.to(torch.float32) * scale for part in (target, start))
        solved = _descend(context, goal, begin, kept, matrix, steps, field)
        torch.div(solved, scale, out=found)

    map_rows(context, solve, target, start, kept, found)
    return found


def _patterns(kept: Tensor) -> list[list[int]]:
    """The rows that have equal masks, together."""
    rows: dict[bytes, list[int]] = {}
    for row, bits in enumerate(np.packbits(kept.cpu().numpy(), axis=1)):
        rows.setdefault(bits.tobytes(), []).append(row)
    return list(rows.values())


def _direct_cost(kept: Tensor, patterns: list[list[int]]) -> float:
    """The operations of a factorization of each pattern; in float64 each counts twice."""
    sizes = kept[[rows[0] for rows in patterns]].sum(1).tolist()
    return sum(2.0 / 3.0 * float(size) ** 3 for size in sizes)


def _solve_patterns(
    context: RequestContext,
    target: Tensor,
    kept: Tensor,
    matrix: Tensor,
    patterns: list[list[int]],
    field: str,
) -> Tensor:
    found = torch.where(kept, target.to(torch.float32), 0.0)
    for rows in context.each(patterns):
        inside = kept[rows[0]].nonzero().view(-1)
        outside = (~kept[rows[0]]).nonzero().view(-1)
        if len(inside) == 0 or len(outside) == 0:
            continue
        index = torch.tensor(rows, device=found.device).unsqueeze(1)
        lost = matrix.new_zeros(len(rows), len(inside), dtype=torch.float64)
        for begin, end in spans(len(outside), _LINES):
            context.check()
            some = outside[begin:end]
            lost.addmm_(target[index, some].double(), matrix[some][:, inside].double())
        lower = matrix.new_empty(len(inside), len(inside), dtype=torch.float64)
        for begin, end in spans(len(inside), _LINES):
            lower[begin:end] = matrix[inside[begin:end]][:, inside]
        if failed := cholesky(context, lower):
            raise not_semidefinite(field, int(inside[failed - 1]))
        found[index, inside] += cholesky_solve(context, lower, lost).to(torch.float32)
    return found


def _descend(
    context: RequestContext,
    target: Tensor,
    start: Tensor,
    kept: Tensor,
    matrix: Tensor,
    steps: int,
    field: str,
) -> Tensor:
    """Conjugate gradients with the symmetric Gauss-Seidel preconditioner.

    Eisenstat's way (1981): where the matrix is L + I + L^T, conjugate gradients solve with
    (I + L)^-1 (L + I + L^T) (I + L^T)^-1 = (I + L^T)^-1 + (I + L)^-1 (I - (I + L^T)^-1). The two
    triangles together are one product with the matrix.
    """
    sweeps = Sweeps(context, matrix, kept)
    found = start * kept
    error = found - target
    gradient = torch.empty_like(error)
    for begin, end in spans(len(matrix), _COLUMNS):
        context.check()
        gradient[:, begin:end] = error @ matrix[:, begin:end]
    loss = float((error * gradient).sum(dtype=torch.float64))
    residual = sweeps.forward(gradient.neg_().mul_(kept))
    direction, squares = residual.clone(), _dots(residual, residual)
    for _ in range(steps):
        move = sweeps.backward(direction.clone())
        image = sweeps.forward(direction - move).add_(move)
        curvature = _dots(direction, image)
        moved = _dots(move, move)
        _check_curvature(field, curvature / moved, move)
        length = torch.where(curvature > _FLAT * moved, squares / curvature, 0.0)
        found.addcmul_(move, length)
        residual.addcmul_(image, length, value=-1)
        gain = float((length * squares).sum(dtype=torch.float64))
        loss -= gain
        if gain <= TOLERANCE * loss:
            break
        before, squares = squares, _dots(residual, residual)
        direction.mul_(torch.where(before > 0, squares / before, 0.0)).add_(residual)
    return found


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row with the other's.  Returns: [rows, 1]."""
    return (left * right).sum(1, keepdim=True)


def _check_curvature(field: str, curvature: Tensor, move: Tensor) -> None:
    negative = (curvature < _NEGATIVE).view(-1)
    if negative.any():
        row = int(negative.nonzero()[0])
        raise not_semidefinite(field, int(move[row].abs().argmax()))
