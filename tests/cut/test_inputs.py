"""Unusual values, shapes and memory layouts."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import secateur
from tests.reference import (
    EXACT,
    HALF,
    Step,
    all_l1,
    assert_same_masks,
    custom,
    distinct,
    identity,
    l1,
    ln,
    lowest,
    lowest_slices,
    torch_masks,
)

every_dtype = pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
SHAPES: list[tuple[int, ...]] = [
    *((), (1,), (7,), (1, 1), (4, 5), (3, 1, 4), (2, 3, 4, 2), (3, 2, 4, 2, 3)),
]
EMPTY: list[tuple[int, ...]] = [(0,), (3, 0), (0, 3), (2, 0, 3)]
AMOUNTS = [0, 0.0, 0.137, 0.5, 1.0]

shapes = pytest.mark.parametrize("shapes", [SHAPES, EMPTY], ids=["filled", "empty"])
amounts = pytest.mark.parametrize("amount", AMOUNTS)


def model(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A model of distinct magnitudes, up to the rounding of half precision."""
    whole = distinct((sum(map(math.prod, shapes)),), dtype)
    parts = torch.split(whole, [math.prod(shape) for shape in shapes])
    return {f"w{i}": part.view(shapes[i]) for i, part in enumerate(parts)}


@every_dtype
@shapes
@amounts
def test_elements_of_every_shape_can_be_pruned(
    client: secateur.Client, dtype: torch.dtype, shapes: list[tuple[int, ...]], amount: float
) -> None:
    tensors = model(shapes, dtype)
    for step in (identity(list(tensors)), l1(list(tensors), amount)):
        assert_same_masks(client.prune(tensors, step.spec).masks, torch_masks(tensors, step))


@every_dtype
@shapes
def test_custom_masks_of_every_shape_can_be_given(
    client: secateur.Client, dtype: torch.dtype, shapes: list[tuple[int, ...]]
) -> None:
    tensors = model(shapes, dtype)
    step = custom({name: values > 0 for name, values in tensors.items()})
    assert_same_masks(client.prune(tensors, step.spec).masks, torch_masks(tensors, step))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES + EMPTY], ids=["filled", "with empty ones"])
@amounts
def test_tensors_of_every_shape_are_compared(
    client: secateur.Client, dtype: torch.dtype, shapes: list[tuple[int, ...]], amount: float
) -> None:
    tensors = model(shapes, dtype)
    step = all_l1(list(tensors), amount)
    assert_same_masks(client.prune(tensors, step.spec).masks, torch_masks(tensors, step))


@pytest.mark.parametrize("shape", [s for s in SHAPES + EMPTY if len(s) > 1], ids=str)
@pytest.mark.parametrize("n", [1, 2, math.inf, -math.inf, 0])
def test_slices_of_every_shape_can_be_pruned(
    client: secateur.Client, shape: tuple[int, ...], n: float
) -> None:
    weight = distinct(shape)
    for dim in range(-len(shape), len(shape)):
        mask = client.prune({"w": weight}, secateur.ln_structured("w", 0.5, n, dim)).masks["w"]
        rows = weight.movedim(dim, 0).reshape(shape[dim], weight.numel() // max(1, shape[dim]))
        norms = (  # torch refuses the maximum of an empty slice
            torch.linalg.vector_norm(rows, n, dim=1) if rows.numel() else torch.zeros(shape[dim])
        )
        assert torch.equal(mask, lowest_slices(norms, round(0.5 * shape[dim]), shape, dim))


@every_dtype
@pytest.mark.parametrize("amount", [1, 3, 5, 6, 7, 8])
def test_infinities_are_pruned_last(
    client: secateur.Client, dtype: torch.dtype, amount: int
) -> None:
    values = [math.inf, 1, -math.inf, torch.finfo(dtype).max, -0.0, math.inf, 2, 0.0]
    weight = torch.tensor(values, dtype=dtype)
    (kept,) = lowest([weight], amount)
    specs = [secateur.l1_unstructured("w", amount), secateur.global_unstructured("w", amount)]
    for spec in specs:
        result = client.prune({"w": weight}, spec)
        assert torch.equal(result.masks["w"], kept)
        largest = weight[~kept].double().abs().max()
        assert result.report.rules[0][0].threshold == float(largest)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 0.5, math.inf, "fro", "nuc"])
def test_slices_with_infinities_are_pruned_last(
    client: secateur.Client, dtype: torch.dtype, n: float | str
) -> None:
    weight = distinct((6, 4, 3), dtype)
    weight[1, 2, 0], weight[4, 0, 1] = math.inf, -math.inf
    spec = secateur.ln_structured("w", 4, n=n, dim=0)
    kept = client.prune({"w": weight}, spec).masks["w"][:, 0, 0]
    assert kept.nonzero().flatten().tolist() == [1, 4]
    spec = secateur.ln_structured("w", 5, n=n, dim=0)  # a tie of two infinities
    kept = client.prune({"w": weight}, spec).masks["w"][:, 0, 0]
    assert kept.nonzero().flatten().tolist() == [4]


@every_dtype
def test_norms_of_order_0_and_below_accept_infinities(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    weight = torch.tensor([[math.inf, 0], [3, 4], [-math.inf, math.inf]], dtype=dtype)
    for n, first, second in ((-math.inf, 0, 1), (0, 0, 1), (-1, 0, 1)):
        for amount, expected in ((1, {first}), (2, {first, second})):
            spec = secateur.ln_structured("w", amount, n=n, dim=0)
            mask = client.prune({"w": weight}, spec).masks["w"]
            assert set((~mask[:, 0]).nonzero().flatten().tolist()) == expected


@every_dtype
def test_minus_zero_ties_with_zero(client: secateur.Client, dtype: torch.dtype) -> None:
    weight = torch.tensor([1, 0.0, -0.0, 0.0, -0.0, -1], dtype=dtype)
    mask = client.prune({"w": weight}, secateur.l1_unstructured("w", 3)).masks["w"]
    assert mask.tolist() == [True, False, False, False, True, True]


@every_dtype
def test_subnormal_weights_are_above_zero(client: secateur.Client, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([tiny / 2, tiny / 4, 0, -tiny / 8], dtype=dtype)
    assert int(weight.count_nonzero()) == 3
    step = l1(["w"], 2)
    masks = client.prune({"w": weight}, step.spec).masks
    assert masks["w"].tolist() == [True, True, False, False]
    assert_same_masks(masks, torch_masks({"w": weight}, step))


def nan_where_pruned() -> dict[str, Tensor]:
    return {
        "w_orig": torch.tensor([[math.nan, 1.0], [5.0, 2.0], [3.0, 4.0]]),
        "w_mask": torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
    }


def test_a_nan_that_is_pruned_already_is_ignored(client: secateur.Client) -> None:
    masks = client.prune(nan_where_pruned(), secateur.l1_unstructured("w", 2)).masks
    assert masks["w"].tolist() == [[False, False], [True, False], [True, True]]
    masks = client.prune(nan_where_pruned(), secateur.ln_structured("w", 1, 2, dim=0)).masks
    assert masks["w"].tolist() == [[False, False], [True, True], [True, True]]


def views(weight: Tensor) -> dict[str, Tensor]:
    """Tensors that are equal to `weight` in different memory layouts."""
    wide = torch.zeros(*weight.shape[:-1], 2 * weight.shape[-1])
    wide[..., ::2] = weight
    permuted = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    negated = torch.complex(torch.zeros_like(weight), -weight).conj().imag
    assert negated.is_neg(), "a view whose sign is not in its memory"
    return {
        "plain": weight,
        "strided": wide[..., ::2],
        "permuted": permuted,
        "channels_last": weight.to(memory_format=torch.channels_last),
        "offset": torch.cat([torch.zeros(3), weight.flatten()])[3:].view(weight.shape),
        "negated": negated,
    }


STEPS: list[Callable[[list[str]], Step]] = [
    lambda names: l1(names, 0.137),
    lambda names: ln(names, 0.5, 2, 1),
    lambda names: ln(names, 2, math.inf, -1),
]


@pytest.mark.parametrize("step", STEPS)
def test_the_mask_does_not_depend_on_the_memory_layout(
    client: secateur.Client, step: Callable[[list[str]], Step]
) -> None:
    tensors = views(distinct((6, 4, 3, 5)))
    assert not any(tensors[name].is_contiguous() for name in ("strided", "channels_last"))
    result = client.prune(tensors, step(list(tensors)).spec)
    (mask,) = torch_masks({"w": tensors["plain"]}, step(["w"])).values()
    for name in tensors:
        assert torch.equal(result.masks[name], mask), name
        assert torch.equal(result.state_dict("dense")[name], tensors["plain"] * mask), name


def test_an_expanded_tensor_has_the_mask_of_its_copy(client: secateur.Client) -> None:
    weight = distinct((5, 1)).expand(5, 4)
    (kept,) = lowest([weight], 7)
    masks = client.prune({"w": weight}, secateur.l1_unstructured("w", 7)).masks
    assert_same_masks(masks, {"w": kept})


def test_scores_and_masks_may_have_any_memory_layout(client: secateur.Client) -> None:
    weight, scores = {"w": distinct((6, 4, 3, 5))}, distinct((6, 4, 3, 5), seed=1)
    plain = torch_masks(weight, l1(["w"], 0.5, {"w": scores}))
    for name, view in views(scores).items():
        spec = secateur.l1_unstructured("w", 0.5, importance_scores={"w": view})
        assert torch.equal(client.prune(weight, spec).masks["w"], plain["w"]), name
        spec = secateur.custom_from_mask({"w": view > 0})
        assert torch.equal(client.prune(weight, spec).masks["w"], scores > 0), name


def arrays(plain: np.ndarray[Any, np.dtype[Any]]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    wide = np.zeros((*plain.shape[:-1], 3 * plain.shape[-1]), plain.dtype)
    wide[..., ::3] = plain
    read_only = plain.copy()
    read_only.flags.writeable = False
    return {
        "plain": plain,
        "fortran": np.asfortranarray(plain),
        "strided": wide[..., ::3],
        "backwards": plain[::-1, ::-1].copy()[::-1, ::-1],
        "big_endian": plain.astype(plain.dtype.newbyteorder(">")),
        "read_only": read_only,
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("step", STEPS)
def test_the_mask_of_an_array_does_not_depend_on_its_layout(
    client: secateur.Client, step: Callable[[list[str]], Step], dtype: type
) -> None:
    source = arrays(distinct((6, 4, 3, 5)).numpy().astype(dtype))
    result = client.prune(source, step(list(source)).spec)
    (mask,) = torch_masks({"w": distinct((6, 4, 3, 5))}, step(["w"])).values()
    dense = result.state_dict("dense")
    for name in source:
        assert isinstance(result.masks[name], np.ndarray)
        assert np.array_equal(result.masks[name], mask.numpy()), name
        assert np.array_equal(dense[name], source["plain"] * mask.numpy()), name


def test_scalar_arrays_are_pruned(client: secateur.Client) -> None:
    result = client.prune({"w": np.array(3.0)}, secateur.l1_unstructured("w", 1.0))
    assert result.masks["w"].shape == ()
    assert not result.masks["w"]
    assert result.state_dict("dense")["w"] == 0


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_arrays_are_pruned(client: secateur.Client, shape: tuple[int, ...]) -> None:
    source = {"w": np.zeros(shape, np.float32)}
    result = client.prune(source, secateur.l1_unstructured("w", 1.0))
    assert result.masks["w"].shape == shape
    assert result.state_dict("dense")["w"].shape == shape
    assert result.report.total == result.report.zeros == 0
