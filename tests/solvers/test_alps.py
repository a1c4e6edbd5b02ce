"""ALPS against a transcription of the paper's ADMM in float64, and against magnitudes."""

import pytest
import torch
from torch import Tensor

from secateur_server.errors import Cancelled, InvalidGram
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.alps import alps
from secateur_server.solvers.amounts import EachRow, Layer, Pattern
from secateur_server.solvers.refit import refit
from tests.solvers.layers import AMOUNTS, damped_double, layer, loss, lowest

CONTEXT = RequestContext()


def admm(
    weight: Tensor, gram: Tensor, candidates: Tensor, amount: Layer | EachRow | Pattern
) -> Tensor:
    """Algorithm 1 of the paper with the penalty's schedule of its code.  Returns: the mask."""
    matrix = damped_double(gram, 0.01)
    scale = matrix.diagonal().sqrt()
    matrix = matrix / scale / scale.unsqueeze(1)
    values, vectors = torch.linalg.eigh(matrix)
    goal = weight.double() * scale

    def project(dense: Tensor) -> Tensor:
        return candidates & ~lowest(dense.square(), candidates, amount)

    support = project(goal)
    begin = d = goal * support
    v, rho, has_grown = torch.zeros_like(goal), 0.1, False
    for step in range(300):
        inverse = vectors @ torch.diag(1 / (values + rho)) @ vectors.T
        b = (goal @ matrix - v + rho * d) @ inverse
        mask = project(b + v / rho)
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if (step + 1) % 3 == 0:
            changes = int((mask != support).sum())
            share = changes / min(int(mask.sum()), int((candidates & ~mask).sum()))
            support = mask
            if share > 0.1:
                has_grown, rho = True, rho * 1.3
            elif share > 0.005:
                has_grown, rho = True, rho * 1.2
            elif changes:
                if has_grown:
                    rho *= 1.1
                else:
                    rho, d, v = rho / 5, begin.clone(), torch.zeros_like(v)
            elif has_grown:
                break
            else:
                rho /= 5
            if step >= 30 and share < 0.0003:
                break
    return mask


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_the_mask_is_that_of_the_papers_iteration(
    amount: Layer | EachRow | Pattern, has_prior: bool
) -> None:
    weight, gram = layer(6, 24, seed=3)
    candidates = torch.ones(6, 24, dtype=torch.bool)
    if has_prior:
        candidates = torch.rand(6, 24, generator=torch.Generator().manual_seed(2)) < 0.8
    found, kept = alps(CONTEXT, weight, gram, candidates if has_prior else None, amount)
    assert torch.equal(kept, admm(weight, gram, candidates, amount))
    assert found.dtype == torch.float32
    assert not found[~kept].any()
    expected = refit(CONTEXT, weight, weight, kept, gram, steps=1000)
    assert loss(weight, found, gram) == pytest.approx(loss(weight, expected, gram), rel=0.02)


# A few weights of a layer lose less than the damping of the search can tell apart.
@pytest.mark.parametrize("amount", [a for a in AMOUNTS if a != Layer(7)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_than_magnitudes_and_a_refit(
    amount: Layer | EachRow | Pattern, seed: int
) -> None:
    weight, gram = layer(20, 50, seed)
    found, kept = alps(CONTEXT, weight, gram, None, amount)
    mask = ~amount.prune(weight.abs(), torch.ones_like(kept))
    assert kept.sum() == mask.sum()
    by_magnitude = refit(CONTEXT, weight, weight, mask, gram)
    assert loss(weight, found, gram) <= loss(weight, by_magnitude, gram) * (1 + 1e-5)


@pytest.mark.parametrize("amount", [*AMOUNTS, Layer(0.0), Layer(1.0)], ids=str)
def test_counts_are_exact_under_ties(amount: Layer | EachRow | Pattern) -> None:
    weight = torch.ones(6, 10)
    _, kept = alps(CONTEXT, weight, torch.eye(10), None, amount)
    everything = torch.ones_like(kept)
    expected = lowest(weight, everything, amount)
    assert torch.equal(kept.sum(), (~expected).sum())
    if not isinstance(amount, Layer):
        assert torch.equal(kept.sum(1), (~expected).sum(1))


def test_weights_of_dead_columns_are_pruned_first() -> None:
    weight, gram = layer(4, 8)
    gram[5] = gram[:, 5] = 0
    _, kept = alps(CONTEXT, weight, gram, None, Layer(4))
    assert (~kept).nonzero().tolist() == [[row, 5] for row in range(4)]
    found, kept = alps(CONTEXT, weight, gram, None, Layer(2))
    assert torch.allclose(found[kept[:, 5], 5], weight[kept[:, 5], 5])


def test_faults() -> None:
    gram = torch.eye(6)
    gram[2, 4] = gram[4, 2] = 2.0
    with pytest.raises(InvalidGram, match=r"fc\.gram: the matrix is not positive semidefinite"):
        alps(CONTEXT, torch.randn(2, 6), gram, None, Layer(1), field="fc.gram")
    context = RequestContext()
    context.cancel()
    with pytest.raises(Cancelled):
        alps(context, *layer(2, 6), None, Layer(0.5))
