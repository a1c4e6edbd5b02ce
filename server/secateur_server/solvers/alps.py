"""ALPS: Meng, Behdin, Wang and Mazumder 2024, arXiv 2406.07831."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends.cores import all_cores
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.amounts import Amount
from secateur_server.solvers.factor import cholesky, cholesky_solve, product
from secateur_server.solvers.gram import damped, not_semidefinite
from secateur_server.solvers.refit import refit

# The paper's: the first penalty, iterations between its updates, and those before an early end.
_PENALTY, _UPDATED, _LEAST_STEPS = 0.1, 3, 30
# Penalties at which the masks no longer depend on it: below, only rounding would change them.
_SMALLEST, _LARGEST = 1e-6, 1e6


def alps(
    context: RequestContext,
    weight: Tensor,
    gram: Tensor,
    candidates: Tensor | None,
    amount: Amount,
    damping: float = 0.01,
    steps: int = 300,
    field: str = "gram",
) -> tuple[Tensor, Tensor]:
    """Finds a mask by ADMM, and then refits the kept weights.

    ADMM alternates between the best dense weights and the best pruned ones. A penalty pulls them
    towards each other, and grows until the mask no longer changes. Weights of dead columns count as
    0 there, so they are pruned first; those that are kept do not change. Memory: six copies of the
    weight, and three times the Gram matrix.

    The paper decomposes the matrix into eigenvectors. Here a Cholesky factorization for each
    penalty replaces them: it takes less time than one product with all eigenvectors.

    Args:
        context: The request.
        weight: [rows, columns], of any floating dtype, finite.
        gram: Float32, [columns, columns]: X^T X of the inputs, of any scale.
        candidates: Bool, the shape of the weight. Others are pruned already; None if none is.
        amount: Of the candidates.
        damping: What is added to the diagonal, relative to its mean, while the mask is searched.
        steps: Of ADMM, at most.
        field: The path of the Gram matrix in the request, for errors.

    Returns:
        The weight, float32, 0 where it is not kept; and which elements are kept.

    Raises:
        InvalidGram: The matrix is not positive semidefinite.
        Cancelled: The request has been cancelled.
    """
    if candidates is None:
        candidates = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    with all_cores():
        matrix = damped(gram, damping)
        scale = matrix.diagonal().sqrt()
        matrix.div_(scale).div_(scale.unsqueeze(1))
        target = weight.to(torch.float32) * torch.where(gram.diagonal() > 0, scale, 0.0)
        found, kept = _search(context, matrix, target, candidates, amount, steps, field)
    return refit(context, weight, found.div_(scale), kept, gram, field=field), kept


def _search(
    context: RequestContext,
    matrix: Tensor,
    target: Tensor,
    candidates: Tensor,
    amount: Amount,
    steps: int,
    field: str,
) -> tuple[Tensor, Tensor]:
    """ADMM on scaled columns.  Returns: the pruned weights and their mask."""
    kept = before = _kept(amount, target, candidates)
    first = pruned = target * kept
    if not kept.any() or torch.equal(kept, candidates):
        return pruned, kept
    fewer = min(int(kept.sum()), int((candidates & ~kept).sum()))
    image, dual, penalty = product(context, target, matrix), torch.zeros_like(target), Penalty()
    factor = torch.empty_like(matrix)
    _factorize(context, field, matrix, penalty.value, factor)
    for step in range(1, steps + 1):
        context.check()
        rho = penalty.value
        dense = cholesky_solve(context, factor, (image - dual).add_(pruned, alpha=rho))
        pruned = torch.add(dense, dual, alpha=1 / rho)
        kept = _kept(amount, pruned, candidates)
        pruned.mul_(kept)
        dual.add_(dense.sub_(pruned), alpha=rho)
        if step % _UPDATED:
            continue
        changes, before = int((kept != before).sum()), kept
        if penalty.update(step, changes / fewer):
            break
        if penalty.restarts:
            pruned, dual = first.clone(), torch.zeros_like(target)
        _factorize(context, field, matrix, penalty.value, factor)
    return pruned, kept


@dataclass
class Penalty:
    """The penalty of ADMM, which follows how much of the mask still changes.

    Attributes:
        value: rho in the paper.
        has_grown: Whether it was ever too small.
        restarts: Whether the last update says to begin again, with a smaller penalty.
    """

    value: float = _PENALTY
    has_grown: bool = False
    restarts: bool = False

    def update(self, step: int, share: float) -> bool:
        """Updates the penalty.  Returns: whether the search has ended.

        step: how many are done.
        share: the elements of the mask that have changed since the last update, relative to those
            that are kept, as in the paper, or pruned, if these are fewer.
        """
        had_grown = self.has_grown
        self.restarts = 0 < share <= 0.005 and not had_grown
        self.has_grown = had_grown or share > 0.005
        if self.has_grown:
            factor = 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        else:
            factor = 1 / 5
        self.value = min(self.value * factor, _LARGEST)
        is_stable = step > _LEAST_STEPS and share < 0.0003
        return (share == 0 and had_grown) or is_stable or self.value < _SMALLEST


def _kept(amount: Amount, values: Tensor, candidates: Tensor) -> Tensor:
    return candidates & ~amount.prune(values.abs(), candidates)  # squares might overflow


def _factorize(
    context: RequestContext, field: str, matrix: Tensor, penalty: float, factor: Tensor
) -> None:
    factor.copy_(matrix).diagonal().add_(penalty)
    if failed := cholesky(context, factor):
        raise not_semidefinite(field, failed - 1)
