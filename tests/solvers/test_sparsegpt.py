"""SparseGPT against the removal of one column after another, and against the paper's pseudocode."""

import pytest
import torch
from torch import Tensor

from secateur_server.errors import Cancelled, InvalidGram
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers import eliminate
from secateur_server.solvers.amounts import EachRow, Layer, Pattern
from secateur_server.solvers.sparsegpt import sparsegpt
from tests.solvers.layers import AMOUNTS, damped_double, layer, loss, lowest

CONTEXT = RequestContext()


def by_removal(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Equations 3 and 4 of the paper for a mask: each column's inverse Hessian is made anew."""
    found = weight.double().clone()
    hessian = damped_double(gram, 0.01)
    columns = weight.shape[1]
    for column in range(columns):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(len(weight)):
            if not kept[row, column]:
                change = found[row, column] / inverse[0, 0]
                found[row, column:] -= change * inverse[0]
                found[row, column] = 0
    return found


def pseudocode(
    weight: Tensor,
    gram: Tensor,
    candidates: Tensor,
    amount: Layer | EachRow | Pattern,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, with the amount of each block and the prior mask."""
    w, columns = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped_double(gram, 0.01)), upper=True)
    mask = candidates.clone()
    steps = amount.in_steps(candidates, block_size)
    width = steps.width
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        errors = torch.zeros(len(w), end - begin).double()
        for j in range(begin, end):
            if j % width == 0:
                last = min(j + width, columns)
                scores = w[:, j:last].square() / inverse.diagonal()[j:last].square()
                share = steps.amount(j)
                assert isinstance(share, (Layer, EachRow, Pattern))
                mask[:, j:last] &= ~share.prune(scores.float(), mask[:, j:last])
            errors[:, j - begin] = torch.where(mask[:, j], 0.0, w[:, j] / inverse[j, j])
            w[:, j:end] -= errors[:, j - begin].unsqueeze(1) * inverse[j, j:end]
        w[:, end:] -= errors @ inverse[begin:end, end:]
    return torch.where(mask, w, 0.0), mask


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 12), (6, 14)])
def test_the_weights_are_those_of_removing_one_column_after_another(
    amount: Layer | EachRow | Pattern, rows: int, columns: int
) -> None:
    weight, gram = layer(rows, columns)
    found, kept = sparsegpt(CONTEXT, weight, gram, None, amount, block_size=6)
    assert found.dtype == torch.float32
    assert not found[~kept].any()
    assert torch.allclose(found.double(), by_removal(weight, gram, kept), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 12), (150, 60), (7, 27)])
def test_the_mask_and_the_weights_are_those_of_the_paper(
    amount: Layer | EachRow | Pattern, rows: int, columns: int, has_prior: bool
) -> None:
    weight, gram = layer(rows, columns, seed=1)
    candidates = torch.ones(rows, columns, dtype=torch.bool)
    if has_prior:
        candidates = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)) < 0.8
    prior = candidates if has_prior else None
    found, kept = sparsegpt(CONTEXT, weight, gram, prior, amount, block_size=12)
    expected, mask = pseudocode(weight, gram, candidates, amount, 12)
    assert torch.equal(kept, mask)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)
    counts = lowest(torch.zeros_like(weight), candidates, amount).sum()
    assert (candidates & ~kept).sum() == counts
    assert not (kept & ~candidates).any()


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_without_compiled_kernels_the_result_is_the_same(
    amount: Layer | EachRow | Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = layer(9, 40)
    found, kept = sparsegpt(CONTEXT, weight, gram, None, amount)
    monkeypatch.setattr(eliminate, "has_kernels", lambda: False)
    again, mask = sparsegpt(CONTEXT, weight, gram, None, amount)
    assert torch.equal(kept, mask)
    assert torch.allclose(found, again, atol=1e-5)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (1.0, 60), (0.51, 31)])
def test_counts_are_exact_under_ties(fraction: float, count: int) -> None:
    weight = torch.ones(6, 10)
    for amount in (Layer(fraction), Layer(count)):
        found, kept = sparsegpt(CONTEXT, weight, torch.eye(10), None, amount, block_size=4)
        assert int((~kept).sum()) == count
        assert torch.equal(found, kept.float())
    _, kept = sparsegpt(CONTEXT, weight, torch.eye(10), None, Layer(7), block_size=16)
    assert kept.view(-1).tolist() == [False] * 7 + [True] * 53


def test_weights_of_dead_columns_are_pruned_first() -> None:
    weight, gram = layer(4, 8)
    gram[5] = gram[:, 5] = 0
    found, kept = sparsegpt(CONTEXT, weight, gram, None, Layer(4))
    assert (~kept).nonzero().tolist() == [[row, 5] for row in range(4)]
    assert torch.allclose(found, weight * kept, atol=1e-5)
    found, kept = sparsegpt(CONTEXT, weight, gram, None, Layer(2))
    assert torch.equal(found[2:, 5], weight[2:, 5])
    found, kept = sparsegpt(CONTEXT, weight, torch.zeros(8, 8), None, Layer(3))
    assert (~kept).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert torch.equal(found, weight * kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    weight, gram = layer(4, 16)
    weight = weight.to(dtype)
    before = weight.clone()
    found, kept = sparsegpt(CONTEXT, weight, gram, None, Layer(0.5))
    expected, mask = sparsegpt(CONTEXT, weight.float(), gram, None, Layer(0.5))
    assert torch.equal(kept, mask)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(weight, before)


def test_the_error_is_below_that_of_magnitudes() -> None:
    weight, gram = layer(64, 128)
    found, _ = sparsegpt(CONTEXT, weight, gram, None, Layer(0.5))
    cut = weight * ~Layer(0.5).prune(weight.abs(), torch.ones_like(weight, dtype=torch.bool))
    assert loss(weight, found, gram) < 0.7 * loss(weight, cut, gram)


def test_a_matrix_that_is_not_semidefinite_is_refused() -> None:
    gram = torch.eye(6)
    gram[2, 4] = gram[4, 2] = 2.0
    with pytest.raises(InvalidGram, match=r"fc\.gram: .* column 2"):
        sparsegpt(CONTEXT, torch.ones(2, 6), gram, None, Layer(1), field="fc.gram")


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_a_cancelled_request_ends(amount: Layer | EachRow | Pattern) -> None:
    context = RequestContext()
    context.cancel()
    weight, gram = layer(3, 6)
    with pytest.raises(Cancelled):
        sparsegpt(context, weight, gram, None, amount)
