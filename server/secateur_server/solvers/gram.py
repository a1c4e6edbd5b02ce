"""The Gram matrix X^T X of a layer's inputs: its checks, its damping and its factors.

A column is dead if its inputs were always zero. Its diagonal element is 0, so its weights have no
effect on the error.
"""

import math

import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.errors import InvalidGram, InvalidStateDict
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.factor import cholesky

# Rows that are mirrored at once: the block and its transpose stay in the second-level cache.
_MIRRORED = 256


def full_gram(triangle: Tensor) -> Tensor:
    """Expands the upper triangle of a symmetric matrix.

    Args:
        triangle: Float32, n (n + 1) / 2 elements: the upper triangle row by row.

    Returns:
        Float32, [n, n].
    """
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    gram = torch.empty(n, n, dtype=torch.float32, device=triangle.device)
    begin = 0
    for row in range(n):
        gram[row, row:] = triangle[begin : begin + n - row]
        begin += n - row
    for first, last in spans(n, _MIRRORED):
        block = gram[first:last, first:last].triu()
        gram[first:last, first:last] = block + block.triu(1).T
        gram[last:, first:last] = gram[first:last, last:].T
    return gram


def check_gram(field: str, gram: Tensor) -> None:
    """Refuses a matrix with values that no Gram matrix has.

    A matrix that is not positive semidefinite is found later, when it is factorized.

    Args:
        field: The path in the request, with the layer, for the error.
        gram: Symmetric, [n, n].

    Raises:
        InvalidGram: A value is NaN or infinite, an element of the diagonal is negative, or one of
            a dead column is not zero.
    """
    if not gram.sum().isfinite():  # one pass; a sum of finite values may overflow, so look again
        faults = (~gram.isfinite()).nonzero()
        if len(faults):
            row, column = faults[0].tolist()
            raise InvalidGram(
                field,
                f"element [{row}, {column}] is {float(gram[row, column])}, and {len(faults)} are "
                "not finite; calibrate again with finite inputs",
            )
    negative = (gram.diagonal() < 0).nonzero()
    if len(negative):
        index = int(negative[0])
        raise InvalidGram(
            field,
            f"element {index} of the diagonal is {float(gram[index, index])}; a sum of squares is "
            "never negative",
        )
    dead = (gram.diagonal() == 0).nonzero().view(-1)
    for index in dead.tolist():
        column = int(gram[index].abs().argmax())
        if gram[index, column] != 0:
            raise InvalidGram(
                field,
                f"element [{index}, {column}] is {float(gram[index, column])}, and element {index} "
                "of the diagonal is 0, so that the inputs were always zero; calibrate again",
            )


def check_weight(field: str, weight: Tensor) -> None:
    """Refuses a weight that is not finite in float32.

    Args:
        field: The path in the request, with the tensor, for the error.
        weight: Any shape.

    Raises:
        InvalidStateDict: A value is NaN or infinite, or becomes so.
    """
    faults = not_finite(weight)
    if len(faults):
        index = int(faults[0])
        raise InvalidStateDict(
            field,
            f"element {index} is {float(weight.reshape(-1)[index])}, and {len(faults)} are not "
            "finite in float32; a solver needs finite weights",
        )


def not_finite(weight: Tensor) -> Tensor:
    """Returns the flat indices of the values that are not finite in float32."""
    return (~weight.reshape(-1).to(torch.float32).isfinite()).nonzero().view(-1)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Adds `damping` times the mean of the diagonal to the diagonal.

    Dead columns do not count in the mean. If all are dead, it is 1.

    Args:
        gram: [n, n].
        damping: 0 or more.

    Returns:
        A new matrix. Its dead columns have only the damping, so they depend on no other column.
    """
    diagonal = gram.diagonal()
    live = diagonal[diagonal > 0]
    found = gram.clone()
    found.diagonal().add_(damping * (live.double().mean().item() if len(live) else 1.0))
    return found


def unit_factor(context: RequestContext, field: str, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Factorizes a positive definite matrix into R D^2 R^T, with R an upper triangle.

    The upper Cholesky factor of the inverse, which the SparseGPT paper uses, is D^-1 R^-1: nothing
    has to be inverted.

    Args:
        context: The request.
        field: The path in the request, with the layer, for the error.
        gram: [n, n].

    Returns:
        R, with ones on its diagonal, and the diagonal of D.

    Raises:
        InvalidGram: The matrix is not positive definite.
        Cancelled: The request has been cancelled.
    """
    lower = gram.flip(0, 1)
    if failed := cholesky(context, lower):
        raise not_semidefinite(field, len(gram) - failed)
    upper = lower.flip(0, 1)
    scale = upper.diagonal().clone()
    return upper.div_(scale), scale


def not_semidefinite(field: str, index: int) -> InvalidGram:
    """The error of a matrix whose factorization fails.

    Args:
        field: The path in the request, with the layer.
        index: Of the column at which it fails.
    """
    return InvalidGram(
        field,
        f"the matrix is not positive semidefinite: its factorization fails at column {index}; "
        "raise the damping, or accumulate the matrix in float32 or wider",
    )
