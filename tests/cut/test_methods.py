"""Every method of torch.nn.utils.prune gives torch's masks on weights without ties."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product
from operator import add

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from tests.conftest import examples
from tests.reference import (
    EXACT,
    Step,
    Tensors,
    all_l1,
    assert_same_masks,
    custom,
    distinct,
    identity,
    l1,
    ln,
    torch_masks,
)

SHAPES = {"conv.weight": (6, 4, 3, 3), "fc.weight": (10, 7), "fc.bias": (10,), "scale": ()}
NAMES = list(SHAPES)
AMOUNTS = [0, 0.0, 0.137, 0.5, 1, 1.0]
NORMS: list[float | str] = [1, 2, 3, 0.5, -1, math.inf, -math.inf]
MATRIX_NORMS = ["fro", "nuc"]  # torch accepts "fro" of up to 2 dimensions, "nuc" of exactly 2

exact = pytest.mark.parametrize("dtype", EXACT, ids=str)
amounts = pytest.mark.parametrize("amount", AMOUNTS)


def weights(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """A model of distinct magnitudes."""
    whole = distinct((sum(math.prod(shape) for shape in SHAPES.values()),), dtype, seed)
    parts = torch.split(whole, [math.prod(shape) for shape in SHAPES.values()])
    return {n: part.view(SHAPES[n]) for n, part in zip(NAMES, parts, strict=True)}


def check(client: secateur.Client, tensors: Tensors, step: Step) -> None:
    assert_same_masks(client.prune(tensors, step.spec).masks, torch_masks(tensors, step))


@exact
@amounts
def test_l1_unstructured_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    check(client, weights(dtype), l1(NAMES, amount))


@exact
@amounts
def test_l1_unstructured_with_scores_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    scores = weights(dtype, seed=1)
    scores.pop("fc.bias")  # this one is compared by its weights
    check(client, weights(dtype), l1(NAMES, amount, scores))


@exact
@pytest.mark.parametrize("amount", [*AMOUNTS, 100])
def test_global_unstructured_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    check(client, weights(dtype), all_l1(NAMES, amount))


@exact
@pytest.mark.parametrize("amount", [*AMOUNTS, 100])
def test_global_unstructured_with_scores_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    scores = {"conv.weight": weights(dtype, seed=1)["conv.weight"]}
    # Half of the range, so that no score equals a weight of the other tensors.
    scores["conv.weight"] = scores["conv.weight"] / 2 + 1e-4
    check(client, weights(dtype), all_l1(NAMES, amount, scores))


@pytest.mark.parametrize("scores", EXACT, ids=str)
@exact
def test_scores_of_another_dtype_keep_their_precision(
    client: secateur.Client, dtype: torch.dtype, scores: torch.dtype
) -> None:
    tensors = weights(dtype)
    fine = {n: 1 + 1e-12 * values.double() for n, values in weights(torch.float64, 3).items()}
    coarse = weights(scores, seed=3)
    check(client, tensors, l1(NAMES, 0.5, fine if scores == torch.float64 else coarse))
    check(client, tensors, all_l1(NAMES, 0.5, fine if scores == torch.float64 else coarse))


def every_dim_and_amount(
    shape: Sequence[int], dtype: torch.dtype, n: float | str, scored: bool = False
) -> tuple[dict[str, Tensor], Step]:
    """Makes a tensor for each dim and amount, and one step with a rule for each."""
    dims = range(-len(shape), len(shape))
    cases = {f"w{i}": case for i, case in enumerate(product(dims, AMOUNTS))}
    tensors = {name: distinct(shape, dtype, seed) for seed, name in enumerate(cases)}
    scores = {name: distinct(shape, dtype, 99) for name in cases} if scored else {}
    steps = [
        ln([name], amount, n, dim, {name: scores[name]} if scored else None)
        for name, (dim, amount) in cases.items()
    ]
    return tensors, reduce(add, steps)


@exact
@pytest.mark.parametrize("n", NORMS)
def test_ln_structured_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, n: float | str
) -> None:
    check(client, *every_dim_and_amount((6, 4, 3, 2), dtype, n))
    check(client, *every_dim_and_amount((11, 9), dtype, n))


@exact
@pytest.mark.parametrize("n", [*NORMS, *MATRIX_NORMS])
@pytest.mark.parametrize("scored", [False, True])
def test_ln_structured_with_scores_gives_the_masks_of_torch(
    client: secateur.Client, dtype: torch.dtype, n: float | str, scored: bool
) -> None:
    check(client, *every_dim_and_amount((5, 4, 6), dtype, n, scored))


@exact
def test_ln_structured_prunes_several_tensors(client: secateur.Client, dtype: torch.dtype) -> None:
    check(client, weights(dtype), ln(["conv.weight", "fc.weight"], 0.5, 2, -2))


@exact
@pytest.mark.parametrize("dim", range(-3, 3))
def test_the_norm_of_order_0_counts_nonzero_elements(
    client: secateur.Client, dtype: torch.dtype, dim: int
) -> None:
    weight = distinct((5, 4, 6), dtype)
    order = distinct((weight.shape[dim],)).argsort().tolist()
    for index, zeros in enumerate(order):  # each slice has another number of zeros
        chosen = weight.select(dim, index)
        chosen[torch.arange(chosen.numel()).view(chosen.shape) < zeros] = 0
    for amount in (0.137, 0.5, 1):
        check(client, {"w": weight}, ln(["w"], amount, 0, dim))


@pytest.mark.parametrize("dim", range(-4, 4))
def test_the_frobenius_norm_accepts_slices_of_any_shape(client: secateur.Client, dim: int) -> None:
    # torch raises above 2 dimensions; its 2-norm gives the same numbers.
    tensors = {"w": distinct((6, 4, 3, 3))}
    masks = client.prune(tensors, secateur.ln_structured("w", 0.5, n="fro", dim=dim)).masks
    assert_same_masks(masks, torch_masks(tensors, ln(["w"], 0.5, 2, dim)))


@exact
def test_identity_gives_masks_of_ones(client: secateur.Client, dtype: torch.dtype) -> None:
    result = client.prune(weights(dtype), identity(NAMES).spec)
    assert_same_masks(result.masks, torch_masks(weights(dtype), identity(NAMES)))
    assert all(bool(mask.all()) for mask in result.masks.values())
    assert result.report.is_pruned


@exact
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_custom_masks_are_applied_unchanged(
    client: secateur.Client, dtype: torch.dtype, kind: torch.dtype
) -> None:
    masks = {n: (values > 0).to(kind) for n, values in weights(dtype, seed=1).items()}
    check(client, weights(dtype), custom(masks))


@st.composite
def tensors_and_steps(draw: st.DrawFn) -> tuple[dict[str, Tensor], Step]:
    """Draws one tensor of any shape, and a way to prune it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    weight = distinct(shape, draw(st.sampled_from(EXACT)), draw(st.integers(0, 10**6)))
    structured = len(shape) > 1 and draw(st.booleans())
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    units = shape[dim] if structured else weight.numel()
    amount = draw(st.floats(0, 1) | st.integers(0, units))
    if not structured:
        return {"w": weight}, l1(["w"], amount)
    n = draw(st.sampled_from(NORMS + MATRIX_NORMS * (len(shape) == 3)))
    assume(are_apart(weight, n, dim))
    return {"w": weight}, ln(["w"], amount, n, dim)


def are_apart(weight: Tensor, n: float | str, dim: int) -> bool:
    """Whether rounding can neither swap nor merge the norms of two slices."""
    rows = weight.double().movedim(dim, 0)
    if n == "nuc":
        norms = torch.linalg.matrix_norm(rows, "nuc")
    else:
        norms = torch.linalg.vector_norm(rows.flatten(1), 2 if n == "fro" else float(n), dim=1)
    ranked = norms.sort().values
    return bool((ranked.diff() > 1e-5 * ranked[1:]).all())


@examples(200)
@given(case=tensors_and_steps())
def test_any_shape_and_amount_gives_the_masks_of_torch(
    client: secateur.Client, case: tuple[dict[str, Tensor], Step]
) -> None:
    check(client, *case)


@pytest.mark.parametrize(("fraction", "pruned"), [(0.25, 2), (0.75, 8), (0.15, 2), (0.05, 0)])
def test_the_product_of_fraction_and_units_is_rounded(
    client: secateur.Client, fraction: float, pruned: int
) -> None:
    tensors = {"flat": distinct((10,)), "square": distinct((10, 3))}
    spec = secateur.l1_unstructured("flat", fraction) + secateur.ln_structured(
        "square", fraction, n=2, dim=0
    )
    masks = client.prune(tensors, spec).masks
    assert int((~masks["flat"]).sum()) == pruned
    assert int((~masks["square"]).sum()) == 3 * pruned


@examples(60)
@given(fraction=st.floats(0, 1), elements=st.integers(1, 3000))
def test_a_fraction_is_rounded_as_python_rounds(
    client: secateur.Client, fraction: float, elements: int
) -> None:
    result = client.prune({"w": distinct((elements,))}, secateur.l1_unstructured("w", fraction))
    assert int((~result.masks["w"]).sum()) == round(fraction * elements)
    assert result.report.rules[0][0].requested == round(fraction * elements)


def test_1_is_one_unit_and_1_0_is_all_units(client: secateur.Client) -> None:
    tensors = {"w": distinct((4, 6))}

    def pruned(spec: secateur.Spec) -> int:
        return int((~client.prune(tensors, spec).masks["w"]).sum())

    assert pruned(secateur.l1_unstructured("w", 1)) == 1
    assert pruned(secateur.l1_unstructured("w", 1.0)) == 24
    assert pruned(secateur.random_structured("w", 1, dim=0)) == 6
    assert pruned(secateur.random_structured("w", 1.0, dim=0)) == 24


def test_zeros_without_a_mask_are_ordinary_candidates(client: secateur.Client) -> None:
    weight = distinct((10,))
    weight[3:8] = 0
    masks = client.prune({"w": weight}, secateur.l1_unstructured("w", 0.5)).masks
    assert (~masks["w"]).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    # A dense model has no mask, so the same zeros are pruned again.
    dense = client.prune({"w": weight}, secateur.l1_unstructured("w", 0.5)).state_dict("dense")
    again = client.prune(dense, secateur.l1_unstructured("w", 0.5)).masks
    assert torch.equal(again["w"], masks["w"])


def test_masks_of_one_rule_are_reported_in_the_order_of_the_state_dict(
    client: secateur.Client,
) -> None:
    """Their protobuf map has no order; it differs from process to process."""
    model = {f"{number * 7 % 20}.weight": torch.ones(2) for number in range(20)}
    spec = secateur.custom_from_mask({name: torch.ones(2) for name in sorted(model)})
    (choices,) = client.prune(model, spec).report.rules
    assert [tuple(choice.tensors) for choice in choices] == [(name,) for name in model]
