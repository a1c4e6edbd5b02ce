"""Refits against least squares of each row, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.backends.cores import CORES, all_cores
from secateur_server.errors import Cancelled, InvalidGram
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers import eliminate
from secateur_server.solvers import refit as refits
from secateur_server.solvers.refit import refit
from tests.solvers.layers import damped_double, layer, least_squares, loss

CONTEXT = RequestContext()


@pytest.fixture
def iterates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is solved directly, and the iteration runs to its end."""
    monkeypatch.setattr(refits, "_direct_cost", lambda kept, patterns: torch.inf)
    monkeypatch.setattr(refits, "TOLERANCE", 0.0)


def random_mask(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(rows=st.integers(1, 9), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_direct_solution_is_that_of_least_squares(rows: int, columns: int, seed: int) -> None:
    weight, gram = layer(rows, columns, seed)
    kept = random_mask(rows, columns, seed)
    found = refit(CONTEXT, weight, weight, kept, gram, steps=1000)
    assert found.dtype == torch.float32
    assert not found[~kept].any()
    expected = least_squares(weight, kept, gram, 1e-4)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("iterates")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (300, 30), (7, 150), (3, 300)])
def test_the_iteration_ends_at_the_solution_of_least_squares(rows: int, columns: int) -> None:
    weight, gram = layer(rows, columns)
    kept = random_mask(rows, columns)
    found = refit(CONTEXT, weight, weight, kept, gram, damping=0.01, steps=40)
    assert not found[~kept].any()
    expected = least_squares(weight, kept, gram, 0.01)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("iterates")
def test_no_step_raises_the_error() -> None:
    weight, gram = layer(6, 60)
    kept = random_mask(6, 60)
    matrix = damped_double(gram, 1e-4)
    errors = [loss(weight, weight * kept, matrix)]
    for steps in range(1, 12):
        found = refit(CONTEXT, weight, weight * kept, kept, gram, steps=steps)
        errors.append(loss(weight, found, matrix))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    best = loss(weight, least_squares(weight, kept, gram, 1e-4), matrix)
    assert errors[-1] == pytest.approx(best, rel=0.02)


@pytest.mark.usefixtures("iterates")
def test_the_iteration_begins_at_the_start_and_aims_at_the_target() -> None:
    weight, gram = layer(4, 30)
    kept = random_mask(4, 30)
    start = torch.randn(4, 30)
    none = refit(CONTEXT, weight, start, kept, gram, steps=0)
    assert torch.allclose(none, start * kept)
    found = refit(CONTEXT, weight, start, kept, gram, damping=0.01, steps=40)
    expected = least_squares(weight, kept, gram, 0.01)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("iterates")
def test_without_compiled_kernels_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(5, 150)
    kept = random_mask(5, 150)
    found = refit(CONTEXT, weight, weight, kept, gram)
    monkeypatch.setattr(eliminate, "has_kernels", lambda: False)
    assert torch.allclose(refit(CONTEXT, weight, weight, kept, gram), found, atol=1e-4)


def test_torch_uses_all_cores_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with all_cores():
        assert torch.get_num_threads() == CORES
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_structured_masks_are_solved_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(refits, "_descend")
    weight, gram = layer(50, 64)
    kept = torch.ones(50, 64, dtype=torch.bool)
    kept[:, 10:30] = False
    kept[5] = False
    kept[7] = True
    found = refit(CONTEXT, weight, weight, kept, gram)
    expected = least_squares(weight, kept, gram, 1e-4)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[7], weight[7])
    assert not found[5].any()


@pytest.mark.parametrize("is_direct", [True, False])
def test_weights_of_dead_columns_become_the_targets(
    is_direct: bool, request: pytest.FixtureRequest
) -> None:
    if not is_direct:
        request.getfixturevalue("iterates")
    weight, gram = layer(8, 20)
    gram[[3, 7]] = 0
    gram[:, [3, 7]] = 0
    kept = random_mask(8, 20)
    found = refit(CONTEXT, weight, torch.zeros_like(weight), kept, gram, 0.01, 40)
    expected = torch.where(kept, weight, 0.0)[:, [3, 7]]
    assert torch.allclose(found[:, [3, 7]], expected, atol=1e-5)


@pytest.mark.usefixtures("iterates")
@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_a_gram_matrix_of_zeros_and_one_of_rank_one(damping: float) -> None:
    weight, _ = layer(4, 12)
    kept = random_mask(4, 12)
    found = refit(CONTEXT, weight, weight, kept, torch.zeros(12, 12), damping)
    assert torch.allclose(found, weight * kept)
    inputs = torch.randn(12)
    found = refit(CONTEXT, weight, weight, kept, torch.outer(inputs, inputs), damping)
    assert torch.allclose(found @ inputs, weight @ inputs, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    weight, gram = layer(4, 16)
    kept = random_mask(4, 16)
    weight = weight.to(dtype)
    found = refit(CONTEXT, weight, weight, kept, gram)
    assert found.dtype == torch.float32
    expected = least_squares(weight.float(), kept, gram, 1e-4)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_matrix_that_is_not_semidefinite_is_refused(
    is_direct: bool, request: pytest.FixtureRequest
) -> None:
    if not is_direct:
        request.getfixturevalue("iterates")
    weight = torch.randn(4, 6)
    gram = torch.eye(6)
    gram[2, 4] = gram[4, 2] = 2.0
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[:, 0] = False
    gram[0, 2] = gram[2, 0] = 0.5
    with pytest.raises(InvalidGram, match=r"fc\.gram: the matrix is not positive semidefinite"):
        refit(CONTEXT, weight, weight, kept, gram, field="fc.gram")


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_cancelled_request_ends(is_direct: bool, request: pytest.FixtureRequest) -> None:
    if not is_direct:
        request.getfixturevalue("iterates")
    context = RequestContext()
    context.cancel()
    weight, gram = layer(20, 6)
    with pytest.raises(Cancelled):
        refit(context, weight, weight, random_mask(20, 6), gram)
