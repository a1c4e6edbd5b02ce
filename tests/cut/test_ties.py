"""Weights with many ties: torch's count and magnitudes, but the lowest flat index first."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import secateur
from tests.conftest import examples
from tests.reference import (
    EXACT,
    HALF,
    all_l1,
    assert_same_masks,
    count_of,
    l1,
    ln,
    lowest,
    lowest_slices,
    torch_masks,
)

ALL = (*EXACT, *HALF)


def small_integers(min_dims: int = 1, max_dims: int = 4) -> st.SearchStrategy[Tensor]:
    """Tensors of few values, -0.0 among them."""
    values = st.sampled_from([-3.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0])
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, max_side=6)
    arrays = hnp.arrays(np.float64, shapes, elements=values)
    return st.builds(lambda a, dtype: torch.from_numpy(a).to(dtype), arrays, st.sampled_from(ALL))


def amount_of(data: st.DataObject, units: int) -> float:
    drawn: float = data.draw(st.floats(0, 1) | st.integers(0, units), label="amount")
    return drawn


def magnitudes(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> list[float]:
    """Returns the pruned magnitudes, sorted."""
    pruned = [tensors[name][~mask].double().abs() for name, mask in masks.items()]
    return torch.cat(pruned).sort().values.tolist()


@examples(150)
@given(weight=small_integers(), data=st.data())
def test_ties_in_a_tensor_are_pruned_from_the_lowest_index(
    client: secateur.Client, weight: Tensor, data: st.DataObject
) -> None:
    amount = amount_of(data, weight.numel())
    step, tensors = l1(["w"], amount), {"w": weight}
    masks = client.prune(tensors, step.spec).masks
    (expected,) = lowest([weight], count_of(amount, weight.numel()))
    assert_same_masks(masks, {"w": expected})
    assert magnitudes(tensors, masks) == magnitudes(tensors, torch_masks(tensors, step))


@examples(80)
@given(weights=st.lists(small_integers(), min_size=2, max_size=4), data=st.data())
def test_ties_across_tensors_are_pruned_in_the_order_of_the_state_dict(
    client: secateur.Client, weights: list[Tensor], data: st.DataObject
) -> None:
    names = data.draw(st.permutations(["a", "b", "c", "d"]))[: len(weights)]
    tensors = dict(zip(names, weights, strict=True))
    total = sum(weight.numel() for weight in weights)
    amount = amount_of(data, total)
    step = all_l1(data.draw(st.permutations(names)), amount)  # the order of the spec is irrelevant
    masks = client.prune(tensors, step.spec).masks
    expected = lowest(weights, count_of(amount, total))
    assert_same_masks(masks, dict(zip(names, expected, strict=True)))
    assert magnitudes(tensors, masks) == magnitudes(tensors, torch_masks(tensors, step))


# Exact numbers with the order of the norms.
EXACT_NORMS: dict[float, Callable[[list[int]], float | Fraction]] = {
    0: lambda row: sum(value != 0 for value in row),
    1: lambda row: sum(map(abs, row)),
    2: lambda row: sum(value**2 for value in row),
    3: lambda row: sum(abs(value) ** 3 for value in row),
    -1: lambda row: Fraction(0) if 0 in row else 1 / sum(1 / Fraction(abs(v)) for v in row),
    math.inf: lambda row: max(map(abs, row)),
    -math.inf: lambda row: min(map(abs, row)),
}


def ranks(weight: Tensor, n: float, dim: int) -> Tensor:
    """Returns the rank of each slice among the distinct norms."""
    rows = weight.double().movedim(dim, 0).flatten(1).to(torch.int64).tolist()
    norms = [EXACT_NORMS[n](row) for row in rows]
    order = sorted(set(norms))
    return torch.tensor([order.index(norm) for norm in norms])


@examples(200)
@given(
    weight=small_integers(min_dims=2),
    n=st.sampled_from(list(EXACT_NORMS)),
    data=st.data(),
)
def test_slices_of_equal_norms_are_pruned_from_the_lowest_index(
    client: secateur.Client, weight: Tensor, n: float, data: st.DataObject
) -> None:
    assume(n >= 0 or math.isinf(n) or weight.dtype != torch.float64)  # thirds do not add up exactly
    dim = data.draw(st.integers(-weight.dim(), weight.dim() - 1), label="dim")
    amount = amount_of(data, weight.shape[dim])
    step = ln(["w"], amount, n, dim)
    mask = client.prune({"w": weight}, step.spec).masks["w"]
    placed = ranks(weight, n, dim)
    count = count_of(amount, weight.shape[dim])
    assert torch.equal(mask, lowest_slices(placed, count, weight.shape, dim))
    theirs = torch_masks({"w": weight}, step)["w"]
    if weight.dtype in EXACT:  # torch rounds halves as it adds them up
        assert pruned_ranks(placed, mask, dim) == pruned_ranks(placed, theirs, dim)


def pruned_ranks(placed: Tensor, mask: Tensor, dim: int) -> list[int]:
    kept = mask.movedim(dim, 0).flatten(1).any(1)
    ranked: list[int] = placed[~kept].sort().values.tolist()
    return ranked


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("amount", [0.137, 0.5, 13])
def test_a_constant_tensor_loses_its_first_elements(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    weight = torch.full((10, 10), -0.5, dtype=dtype)
    count = count_of(amount, 100)
    mask = client.prune({"w": weight}, secateur.l1_unstructured("w", amount)).masks["w"]
    assert (~mask).flatten().nonzero().flatten().tolist() == list(range(count))


def test_slices_with_the_same_values_in_any_order_are_ties(
    client: secateur.Client,
) -> None:
    # Each row is summed in another order, but rounding must not decide what is pruned.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator)
    rows = [values[torch.randperm(1000, generator=generator)] for _ in range(20)]
    weight = torch.stack(rows)
    for n in (1, 2, 3, 0.5):
        mask = client.prune({"w": weight}, secateur.ln_structured("w", 7, n=n, dim=0)).masks["w"]
        assert torch.equal(mask, lowest_slices(torch.ones(20), 7, (20, 1000), 0)), n


def test_the_report_has_the_number_of_ties(client: secateur.Client) -> None:
    weight = torch.tensor([1.0, -2.0, 2.0, 3.0, 2.0, -2.0])
    choice = client.prune({"w": weight}, secateur.l1_unstructured("w", 3)).report.rules[0][0]
    assert (choice.threshold, choice.ties, choice.ties_pruned) == (2.0, 4, 2)
    assert (choice.candidates, choice.requested, choice.pruned) == (6, 3, 3)
