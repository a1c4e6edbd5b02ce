"""The Gram matrix: its triangle, its checks and its factors."""

import numpy as np
import pytest
import torch

from secateur_server.errors import InvalidGram, InvalidStateDict
from secateur_server.runtime.context import RequestContext
from secateur_server.solvers.gram import check_gram, check_weight, damped, full_gram, unit_factor
from tests.solvers.layers import layer


@pytest.mark.parametrize("n", [1, 2, 7, 256, 600])
def test_a_triangle_is_expanded(n: int) -> None:
    triangle = torch.randn(n * (n + 1) // 2)
    expected = np.zeros((n, n), np.float32)
    expected[np.triu_indices(n)] = triangle.numpy()
    expected += np.triu(expected, 1).T
    assert np.array_equal(full_gram(triangle).numpy(), expected)


def test_an_empty_triangle_is_expanded() -> None:
    assert full_gram(torch.empty(0)).shape == (0, 0)
    check_gram("gram", torch.empty(0, 0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    _, gram = layer(1, 5)
    check_gram("layer1.gram", gram)
    gram[2, 3] = gram[3, 2] = value
    with pytest.raises(InvalidGram, match=r"^layer1\.gram: element \[2, 3\] is .*, and 2 are not"):
        check_gram("layer1.gram", gram)


def test_large_values_are_legal() -> None:
    check_gram("gram", torch.full((4, 4), 3e38))


def test_a_negative_diagonal_is_refused() -> None:
    gram = torch.eye(4)
    gram[2, 2] = -0.5
    with pytest.raises(InvalidGram, match=r"element 2 of the diagonal is -0\.5"):
        check_gram("gram", gram)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = torch.zeros(2, 3).T
    check_weight("fc.weight", weight)
    weight[1, 1] = torch.inf
    with pytest.raises(InvalidStateDict, match=r"fc\.weight: element 3 is inf, and 1 are not"):
        check_weight("fc.weight", weight)


def test_the_damping_is_relative_to_the_mean_of_live_columns() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert damped(gram, 0.5).diagonal().tolist() == [2, 1, 4]
    assert damped(torch.zeros(2, 2), 0.5).diagonal().tolist() == [0.5, 0.5]
    assert gram.diagonal().tolist() == [1, 0, 3]


def test_the_factor_has_that_of_the_inverse_as_its_inverse() -> None:
    _, gram = layer(1, 40)
    gram = damped(gram, 0.01).double()
    unit, scale = unit_factor(RequestContext(), "gram", gram)
    assert torch.equal(unit, unit.triu())
    assert torch.equal(unit.diagonal(), torch.ones(40).double())
    assert torch.allclose(unit * scale.square() @ unit.T, gram)
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    assert torch.allclose(torch.linalg.inv(unit) / scale.unsqueeze(1), expected)


def test_a_matrix_that_is_not_semidefinite_names_the_minor() -> None:
    gram = torch.eye(6)
    gram[2, 4] = gram[4, 2] = 2.0
    with pytest.raises(InvalidGram, match=r"gram: .*fails at column 2"):
        unit_factor(RequestContext(), "gram", gram)
