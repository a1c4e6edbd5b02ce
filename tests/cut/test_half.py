"""fp16 and bf16: compared by their values, where torch compares rounded scores."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from tests.conftest import examples
from tests.reference import (
    HALF,
    all_l1,
    assert_same_masks,
    count_of,
    distinct,
    l1,
    lowest,
    lowest_slices,
    torch_masks,
)

AMOUNTS = [0, 0.0, 0.137, 0.5, 1, 1.0]
NORMS = [0, 1, 2, 3, 0.5, math.inf, -math.inf]

half = pytest.mark.parametrize("dtype", HALF, ids=str)


@half
@pytest.mark.parametrize("amount", AMOUNTS)
def test_elements_are_compared_by_magnitude(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    tensors = {"a": distinct((20, 30), dtype), "b": distinct((500,), dtype, seed=1)}
    masks = client.prune(tensors, l1(["a", "b"], amount).spec).masks
    for name, weight in tensors.items():
        (kept,) = lowest([weight], count_of(amount, weight.numel()))
        assert torch.equal(masks[name], kept), name


@half
def test_masks_of_distinct_elements_are_those_of_torch(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    # Each magnitude of the dtype from 2^-3 to 2^-2 once, shuffled.
    bits = torch.arange(
        torch.tensor(0.125, dtype=dtype).view(torch.int16).item(),
        torch.tensor(0.25, dtype=dtype).view(torch.int16).item(),
    )
    values = bits.to(torch.int16).view(dtype)
    weight = values[distinct((len(values),)).argsort()]
    for amount in AMOUNTS:
        step = l1(["w"], amount)
        masks = client.prune({"w": weight}, step.spec).masks
        assert_same_masks(masks, torch_masks({"w": weight}, step))


@half
@pytest.mark.parametrize("amount", AMOUNTS)
def test_tensors_of_several_dtypes_are_compared_without_rounding(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    """torch would round all of them to one dtype."""
    kinds = (dtype, torch.float32, torch.float16, torch.float64, torch.bfloat16)
    tensors = {f"w{i}": distinct((9, 11), kind, seed=i) for i, kind in enumerate(kinds)}
    step = all_l1(list(tensors), amount)
    total = sum(t.numel() for t in tensors.values())
    kept = lowest(list(tensors.values()), count_of(amount, total))
    masks = client.prune(tensors, step.spec).masks
    assert_same_masks(masks, dict(zip(tensors, kept, strict=True)))


def exact_norms(weight: Tensor, n: float, dim: int) -> Tensor:
    """Computes norms as exact sums of float64 terms, rounded to float32 once."""
    rows = weight.double().movedim(dim, 0).flatten(1).abs().tolist()
    return torch.tensor([norm(row, n) for row in rows], dtype=torch.float64).float()


def norm(row: Sequence[float], n: float) -> float:
    if n == 0:
        return sum(value != 0 for value in row)
    if math.isinf(n):
        return max(row) if n > 0 else min(row)
    return math.pow(math.fsum(value**n for value in row), 1 / n)


@half
@pytest.mark.parametrize("n", NORMS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_norms_are_summed_in_a_wider_dtype(
    client: secateur.Client, dtype: torch.dtype, n: float, dim: int
) -> None:
    weight = distinct((16, 12, 10), dtype)
    for amount in (1, 0.137, 0.5, 1.0):
        count = count_of(amount, weight.shape[dim])
        spec = secateur.ln_structured("w", amount, n=n, dim=dim)
        mask = client.prune({"w": weight}, spec).masks["w"]
        norms = exact_norms(weight, n, dim)
        assert torch.equal(mask, lowest_slices(norms, count, weight.shape, dim))


def test_bf16_rows_of_close_norms_are_distinguished(client: secateur.Client) -> None:
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = exact_norms(weight, 2, 0)
    assert len(set(norms.tolist())) == 64
    assert len(set(torch.norm(weight, dim=1).tolist())) < 32, "torch's are rounded"
    mask = client.prune({"w": weight}, secateur.ln_structured("w", 32, n=2, dim=0)).masks["w"]
    assert torch.equal(mask, lowest_slices(norms, 32, weight.shape, 0))


def test_fp16_norms_do_not_overflow(client: secateur.Client) -> None:
    weight = torch.full((8, 64), 1200, dtype=torch.float16)
    weight[:, 0] = torch.tensor([7.0, 3, 5, 1, 8, 2, 6, 4]) * 1000
    assert bool(torch.norm(weight, p=1, dim=1).isinf().all()), "torch's are all infinite"
    mask = client.prune({"w": weight}, secateur.ln_structured("w", 3, n=1, dim=0)).masks["w"]
    assert (~mask[:, 0]).nonzero().flatten().tolist() == [1, 3, 5]


@examples(60)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(HALF),
    elements=st.integers(1, 3000),
    amount=st.floats(0, 1),
)
def test_elements_of_any_half_precision_tensor_are_compared_exactly(
    client: secateur.Client, seed: int, dtype: torch.dtype, elements: int, amount: float
) -> None:
    weight = distinct((elements,), dtype, seed)
    (kept,) = lowest([weight], round(amount * elements))
    masks = client.prune({"w": weight}, secateur.l1_unstructured("w", amount)).masks
    assert_same_masks(masks, {"w": kept})
