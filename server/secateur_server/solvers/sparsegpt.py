"""SparseGPT: Frantar and Alistarh 2023, arXiv 2301.00774."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.cores import all_cores
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.amounts import Amount
from secateur_server.solvers.eliminate import eliminate
from secateur_server.solvers.gram import damped, unit_factor
from secateur_server.solvers.rows import map_rows


def sparsegpt(
    context: RequestContext,
    weight: Tensor,
    gram: Tensor,
    candidates: Tensor | None,
    amount: Amount,
    damping: float = 0.01,
    block_size: int = 128,
    field: str = "gram",
) -> tuple[Tensor, Tensor]:
    """Prunes column by column, and makes up for each pruned weight in the columns after it.

    Weights of dead columns score 0, so a block prunes them first. Those that it keeps do not
    change. Memory: two copies of the weight beside the result, and twice the Gram matrix.

    Args:
        context: The request.
        weight: [rows, columns], of any floating dtype, finite.
        gram: Float32, [columns, columns]: X^T X of the inputs, of any scale.
        candidates: Bool, the shape of the weight. Others are pruned already; None if none is.
        amount: Of the candidates. `Layer` and `EachRow` prune the same share of each block.
        damping: What is added to the diagonal, relative to its mean. Of a matrix of low rank it
            must be above 0.
        block_size: Columns whose scores are compared. For a pattern rounded up to whole groups.
        field: The path of the Gram matrix in the request, for errors.

    Returns:
        The weight, float32, 0 where it is not kept; and which elements are kept.

    Raises:
        InvalidGram: The damped matrix is not positive definite.
        Cancelled: The request has been cancelled.
    """
    context.check()
    with all_cores():
        unit, scale = unit_factor(context, field, damped(gram, damping))
    scale = torch.where(gram.diagonal() > 0, scale, 0.0)
    found = weight.to(torch.float32, copy=True)
    kept = torch.ones_like(found, dtype=torch.bool) if candidates is None else candidates.clone()
    factor = _Factor(unit, scale, block_size)
    if amount.is_by_row:  # then no row waits for the others
        map_rows(context, partial(_prune, context, amount, factor), weight, found, kept)
    else:
        _prune(context, amount, factor, weight, found, kept)
    return found, kept


@dataclass(frozen=True)
class _Factor:
    """The damped Gram matrix is unit diag(scale)^2 unit^T. A scale of 0: the column is dead."""

    unit: Tensor
    scale: Tensor
    block_size: int


def _prune(
    context: RequestContext,
    amount: Amount,
    factor: _Factor,
    weight: Tensor,
    found: Tensor,
    kept: Tensor,
) -> None:
    """Changes `found` and `kept`: before, a copy of the weight and its candidates."""
    steps = amount.in_steps(kept, factor.block_size)
    removed = torch.empty_like(found)  # what each column has lost
    width = -(-factor.block_size // steps.width) * steps.width
    for begin, end in spans(found.shape[1], width):
        triangle, scale = _inverse(factor.unit[begin:end, begin:end]), factor.scale[begin:end]
        unit = factor.unit[:begin, begin:end] @ triangle
        # The best values for what the columns before have lost.
        block, marks = found[:, begin:end], kept[:, begin:end]
        map_rows(context, partial(_add_product, unit), block, removed[:, :begin])
        for first, last in spans(end - begin, steps.width):
            scores = (block[:, first:last] * scale[first:last]).abs_()  # squares might overflow
            some = marks[:, first:last]
            some ^= steps.amount(begin + first).prune(scores, some)
            work = partial(_eliminate, triangle, range(first, last))
            map_rows(context, work, block, marks)
        block.mul_(marks)
        torch.sub(weight[:, begin:end], block, out=removed[:, begin:end])


def _add_product(unit: Tensor, block: Tensor, removed: Tensor) -> None:
    block.addmm_(removed, unit)


def _eliminate(triangle: Tensor, sources: range, block: Tensor, kept: Tensor) -> None:
    eliminate(block, ~kept, triangle, sources)


def _inverse(unit: Tensor) -> Tensor:
    """The inverse of an upper triangle with ones on its diagonal."""
    identity = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    inverse: Tensor = torch.linalg.solve_triangular(unit, identity, upper=True, unitriangular=True)
    return inverse
