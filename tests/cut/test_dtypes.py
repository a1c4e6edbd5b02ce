"""fp8 and integers: compared by their values, and returned in their dtype."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.literals import Form
from secateur_server.backends import kernels
from secateur_server.backends.numba_backend import NumbaBackend
from secateur_server.backends.protocol import Backend
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut import select, sorted_keys
from secateur_server.cut.prune import prune
from secateur_server.granularity.element import Element
from secateur_server.importance.magnitude import Magnitude
from secateur_server.report.measure import measure
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Count
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.masks import packed
from tests.reference import (
    BITS,
    all_l1,
    assert_same_masks,
    assert_same_tensors,
    by_torch,
    count_of,
    l1,
    ln,
    lowest,
    lowest_slices,
    place,
    same_bits,
    torch_masks,
)
from tests.reference import prune as by_torch_prune

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
SPELLED = dict(
    zip([*FP8, *INTEGERS], ["F8_E4M3", "F8_E5M2", "I8", "I16", "I32", "I64", "U8"], strict=True)
)
AMOUNTS = [0, 0.137, 0.5, 1, 1.0]
CPU = torch.device("cpu")

every_dtype = pytest.mark.parametrize("dtype", SPELLED, ids=str)
every_fp8 = pytest.mark.parametrize("dtype", FP8, ids=str)
every_integer = pytest.mark.parametrize("dtype", INTEGERS, ids=str)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random finite numbers, with zeros of both signs and the lowest integer."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    values = bits.to(BITS[dtype.itemsize]).view(dtype)
    if dtype in FP8:
        finite = values.half().isfinite()
        values = torch.where(finite, values, torch.full_like(values, -0.0))
    return values


def folded(weight: Tensor, mask: Tensor) -> Tensor:
    """Sets pruned elements to zero; the zero of a float keeps the sign."""
    if not weight.dtype.is_floating_point:
        return weight * mask
    wide = weight.float()
    return torch.where(mask, wide, torch.copysign(torch.zeros(()), wide)).to(weight.dtype)


@every_dtype
@pytest.mark.parametrize("amount", AMOUNTS)
def test_elements_are_compared_by_magnitude(
    client: secateur.Client, dtype: torch.dtype, amount: float
) -> None:
    weight = numbers((40, 30), dtype)
    step = l1(["w"], amount)
    result = client.prune({"w": weight}, step.spec)
    (kept,) = lowest([weight], count_of(amount, 1200))
    assert_same_masks(result.masks, {"w": kept})
    # torch breaks ties in another order, but prunes the same magnitudes of the numbers as float64.
    wide = weight.double()
    theirs = torch_masks({"w": wide}, step)["w"]
    assert torch.equal(wide[kept].abs().sort().values, wide[theirs].abs().sort().values)
    ((choice,),) = result.report.rules
    pruned = wide[~kept].abs()
    assert choice.threshold == (float(pruned.max()) if pruned.numel() else None)
    assert result.report.tensors["w"].dtype == SPELLED[dtype]


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(SPELLED)))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    return numbers(tuple(shape), dtype, draw(st.integers(0, 999)))


@examples(60)
@given(weight=weights(), first=st.floats(0, 1), second=st.floats(0, 1))
def test_a_second_rule_selects_among_the_unpruned_elements(
    client: secateur.Client, weight: Tensor, first: float, second: float
) -> None:
    spec = secateur.l1_unstructured("w", first) + secateur.l1_unstructured("w", second)
    pruned = round(first * weight.numel())
    pruned += round(second * (weight.numel() - pruned))
    (kept,) = lowest([weight], pruned)
    assert_same_masks(client.prune({"w": weight}, spec).masks, {"w": kept})


@every_integer
def test_the_lowest_integer_has_the_largest_magnitude(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    limits = torch.iinfo(dtype)
    half = limits.max // 2
    weight = torch.tensor([limits.min, half, 0, 1, half + 1], dtype=dtype)
    order = [2, 3, 1, 4, 0] if limits.min else [0, 2, 3, 1, 4]
    for count in range(6):
        mask = client.prune({"w": weight}, secateur.l1_unstructured("w", count)).masks["w"]
        assert (~mask).nonzero().view(-1).tolist() == sorted(order[:count])


def test_int32_is_compared_exactly_and_int64_as_float64(client: secateur.Client) -> None:
    close = torch.tensor([2**30 + 1, -(2**30), 2**30 + 2])
    equal = torch.tensor([2**53 + 1, 2**53, 2**53 + 4])
    tensors = {"close": close.int(), "equal": equal}
    masks = client.prune(tensors, secateur.l1_unstructured(["close", "equal"], 1)).masks
    assert masks["close"].tolist() == [True, False, True]
    assert masks["equal"].tolist() == [False, True, True]


@every_dtype
@pytest.mark.parametrize("n", [0, 1, 2, 3, 0.5, math.inf, -math.inf, "fro"])
def test_slices_are_compared_by_their_norms(
    client: secateur.Client, dtype: torch.dtype, n: float | str
) -> None:
    weight = numbers((12, 7, 10), dtype, seed=3)
    order = 2.0 if n == "fro" else float(n)
    for dim in (0, 1, -1):
        rows = weight.double().movedim(dim, 0).flatten(1)
        norms = torch.linalg.vector_norm(rows, order, dim=1)
        norms = norms if dtype in (torch.int32, torch.int64) else norms.float()
        for count in (1, 5):
            step = ln(["w"], count, n, dim)
            masks = client.prune({"w": weight}, step.spec).masks
            assert_same_masks(masks, {"w": lowest_slices(norms, count, weight.shape, dim)})
            if len(norms.unique()) == len(norms):
                assert_same_masks(masks, torch_masks({"w": weight.double()}, step))


@every_dtype
def test_norms_of_partly_pruned_slices(client: secateur.Client, dtype: torch.dtype) -> None:
    weight = numbers((6, 5, 4), dtype, seed=4)
    for n in ("nuc", 1, 2):
        step = l1(["w"], 0.5) + ln(["w"], 2, n, 0)
        found = client.prune({"w": weight}, step.spec).masks["w"]
        (first,) = lowest([weight], 60)
        rest = weight.double() * first
        norms = torch.linalg.matrix_norm(rest, "nuc") if n == "nuc" else rest.norm(n, dim=(1, 2))
        assert len(norms.float().unique()) == 6
        assert torch.equal(found, first & lowest_slices(norms, 2, weight.shape, 0))


def test_rows_of_int32_with_equal_norms_in_float32_are_distinguished(
    client: secateur.Client,
) -> None:
    weight = torch.tensor([[2**30 + 1, 0], [2**30, 0], [2**30 + 2, 0]], dtype=torch.int32)
    for spec in (
        secateur.ln_structured("w", 1, 1, 0),
        secateur.custom_from_mask({"w": torch.tensor([[1, 0]] * 3)})
        + secateur.ln_structured("w", 1, 1, 0),
    ):
        mask = client.prune({"w": weight}, spec).masks["w"]
        assert mask[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_tensors_of_several_dtypes_are_compared_without_rounding(
    client: secateur.Client, amount: float
) -> None:
    kinds = [FP8[0], torch.float32, FP8[1], torch.bfloat16, torch.int8, torch.uint8, torch.float16]
    for some in ([*FP8], kinds[:4], kinds, [*kinds, *INTEGERS, torch.float64]):
        tensors = {}
        for i, kind in enumerate(some):
            values = torch.randn(9, 11, generator=torch.Generator().manual_seed(i)) * 40
            tensors[f"w{i}"] = values.abs().to(kind) if kind == torch.uint8 else values.to(kind)
        step = all_l1(list(tensors), amount)
        kept = lowest(list(tensors.values()), count_of(amount, 99 * len(some)))
        masks = client.prune(tensors, step.spec).masks
        assert_same_masks(masks, dict(zip(tensors, kept, strict=True)))
        wide = {name: values.double() for name, values in tensors.items()}
        theirs = torch_masks(wide, step)
        ours = torch.cat([wide[name][mask].abs() for name, mask in masks.items()])
        magnitudes = torch.cat([wide[name][mask].abs() for name, mask in theirs.items()])
        assert torch.equal(ours.sort().values, magnitudes.sort().values)


GROUP = secateur.group("g", secateur.member("a", 0), secateur.member("b", 1))
METHODS = {
    "n:m": secateur.n_m_structured(["a", "b"]),
    "block": secateur.block_structured(["a", "b"], 0.4, 3, 4, n=2),
    "slice": secateur.global_structured(["a", "b"], 0.4, n=2, dim=1),
    "group": secateur.grouped([GROUP], 5, p=2),
    "lamp": secateur.lamp(["a", "b"], 0.4),
    "z-score": secateur.select(["a", "b"], 0.4, scope="global", normalization="z_score"),
}


@every_dtype
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_give_the_masks_of_the_same_numbers_as_floats(
    client: secateur.Client, dtype: torch.dtype, method: str
) -> None:
    """The tests of each method cover float32 and float64."""
    tensors = {"a": numbers((12, 8), dtype), "b": numbers((8, 12), dtype, seed=1)}
    holds = torch.float64 if dtype in (torch.int32, torch.int64) else torch.float32
    wide = {name: values.to(holds) for name, values in tensors.items()}
    before = secateur.l1_unstructured(["a", "b"], 0.2)
    for spec in (METHODS[method], before + METHODS[method]):
        found, expected = client.prune(tensors, spec), client.prune(wide, spec)
        assert found.report.rules[-1][0].pruned > 0
        assert_same_masks(found.masks, expected.masks)
        for name, entry in expected.report.tensors.items():
            same = replace(entry, dtype=SPELLED[dtype], bytes=tensors[name].nbytes)
            assert found.report.tensors[name] == same
        removed = [
            [planned.norm_removed for planned in client.plan(source, spec, [0.1, 0.5]).amounts]
            for source in (tensors, wide)
        ]
        assert removed[0] == removed[1]


@every_dtype
def test_a_random_selection_does_not_depend_on_the_dtype(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    weight = numbers((20, 30), dtype)
    for spec, pruned in (
        (secateur.random_unstructured("w", 0.3, seed=5), 180),
        (secateur.random_structured("w", 7, dim=1, seed=5), 140),
        (secateur.global_unstructured("w", 0.3, "random", seed=5), 180),
    ):
        masks = client.prune({"w": weight}, spec).masks
        assert int((~masks["w"]).sum()) == pruned
        assert_same_masks(masks, client.prune({"w": torch.ones(20, 30)}, spec).masks)


@every_fp8
def test_scores_may_be_fp8_and_custom_masks_may_not(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    scores = numbers((8, 9), dtype)
    spec = secateur.l1_unstructured("w", 30, importance_scores={"w": scores})
    (kept,) = lowest([scores], 30)
    assert_same_masks(client.prune({"w": torch.ones(8, 9)}, spec).masks, {"w": kept})
    mask = torch.ones(8, 9).to(dtype)
    with pytest.raises(secateur.InvalidSpec, match=SPELLED[dtype]):
        client.prune({"w": torch.ones(8, 9)}, secateur.custom_from_mask({"w": mask}))


@every_dtype
@pytest.mark.parametrize("output", ["masks", "reparametrized", "dense"])
def test_kept_elements_have_the_same_bits_in_every_output(
    client: secateur.Client, dtype: torch.dtype, output: Any, tmp_path: Path
) -> None:
    weight, other = numbers((31, 17), dtype), torch.randn(3)
    (kept,) = lowest([weight], 300)
    dense = {"w": folded(weight, kept), "b": other}
    pair = {"w_orig": weight, "w_mask": kept.to(dtype), "b": other}
    spec = secateur.l1_unstructured("w", 300)
    result = client.prune({"w": weight, "b": other}, spec, output=output)
    expectations: dict[Form, dict[str, torch.Tensor]] = {"dense": dense, "reparametrized": pair}
    for form, expected in expectations.items():
        if output in ("masks", form):
            assert_same_tensors(result.state_dict(form), expected)
            result.save(tmp_path / "m.safetensors", form)
            assert_same_tensors(safetensors.torch.load_file(tmp_path / "m.safetensors"), expected)
    if output != "dense":
        assert_same_masks(result.masks, {"w": kept})
    entry = result.report.tensors["w"]
    assert (entry.zeros, entry.pruned) == (int((dense["w"].float() == 0).sum()), 300)
    assert entry.bytes == weight.nbytes


@every_dtype
def test_a_pair_can_be_pruned_further_and_finalized(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    weight = numbers((20, 10), dtype)
    (kept,) = lowest([weight], 50)
    for mask in (kept.to(dtype), kept, kept.float()):
        pair = {"w_orig": weight, "w_mask": mask}
        assert_same_tensors(client.finalize(pair).state_dict(), {"w": folded(weight, kept)})
        (both,) = lowest([weight], 100)
        half = secateur.l1_unstructured("w", 50)
        assert_same_masks(client.prune(pair, half).masks, {"w": both})
        found = client.report(pair, ["w"]).tensors["w"]
        assert (found.pruned, found.is_pruned, found.total) == (50, True, 200)
        wrong = {"w_orig": weight, "w_mask": mask.float() * 2}
        with pytest.raises(secateur.InvalidStateDict, match="a mask is 0 or 1"):
            client.prune(wrong, half)


@pytest.mark.parametrize("output", ["masks", "dense"])
def test_a_pair_of_integers_is_folded_without_a_rule(client: secateur.Client, output: Any) -> None:
    pair = {"n_orig": torch.tensor([-5, 6]), "n_mask": torch.tensor([0, 1])}
    source = {**pair, "w": torch.tensor([1.0, -2.0])}
    result = client.prune(source, secateur.l1_unstructured("*", 1), output=output)
    assert list(result.report.tensors) == ["w"]
    expected = {"n": torch.tensor([0, 6]), "w": torch.tensor([0.0, -2.0])}
    assert_same_tensors(result.state_dict("dense"), expected)
    final = client.finalize(source)
    assert_same_tensors(final.state_dict(), {"n": expected["n"], "w": source["w"]})
    assert list(final.report.tensors) == ["w"]
    assert_same_tensors(client.finalize(source, ["w"]).state_dict(), source)


@every_integer
def test_integers_that_do_not_form_a_pair_are_two_tensors(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    values = torch.arange(6, dtype=dtype)
    for beside in (
        {"n_mask": torch.ones(5)},
        {"n_mask": torch.ones(6, dtype=torch.uint16)},
        {"n_mask": torch.ones(6), "n": values},
    ):
        source = {"n_orig": values, **beside, "w": torch.ones(3)}
        assert_same_tensors(client.finalize(source).state_dict(), source)
        for output in ("masks", "dense"):
            result = client.prune(source, secateur.l1_unstructured("n_orig", 3), output=output)
            expected = {**source, "n_orig": torch.tensor([0, 0, 0, 3, 4, 5], dtype=dtype)}
            assert_same_tensors(result.state_dict("dense"), expected)


def test_each_nan_of_fp8_is_refused_and_other_bit_patterns_are_not(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("w", 1)
    for dtype in FP8:
        for byte in range(256):
            weight = torch.ones(2, 3, dtype=torch.uint8)
            weight[1, 1:] = byte
            weight = weight.view(dtype)
            if math.isnan(weight[1, 1].item()):
                message = r"data\['w'\].*NaN at \[1, 1\] and in 2 of 6"
                with pytest.raises(secateur.InvalidSpec, match=message):
                    client.prune({"w": weight}, spec)
            elif byte in (0x7E, 0x7C, 0xFC, 0x00):
                (kept,) = lowest([weight], 1)
                assert_same_masks(client.prune({"w": weight}, spec).masks, {"w": kept})


@every_fp8
def test_a_pruned_nan_is_legal_and_a_kept_nan_keeps_its_bits(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    nan = torch.tensor([0x7F, 0xFF, 0x38, 0x01], dtype=torch.uint8).view(dtype)
    both = secateur.custom_from_mask({"w": torch.tensor([0, 0, 1, 1])})
    masks = client.prune({"w": nan}, both + secateur.l1_unstructured("w", 1)).masks
    assert masks["w"].tolist() == [False, False, True, False]
    zeros = torch.tensor([0x00, 0x80, 0x38, 0x01], dtype=torch.uint8).view(dtype)
    for output in ("masks", "dense"):
        assert same_bits(client.prune({"w": nan}, both, output=output).state_dict()["w"], zeros)
        other = secateur.identity(["v"])
        result = client.prune({"w": nan, "v": torch.ones(1)}, other, output=output)
        assert same_bits(result.state_dict()["w"], nan)


def test_a_glob_does_not_match_integers(client: secateur.Client) -> None:
    model = {
        "bn.weight": torch.tensor([1.0, -2.0]),
        "bn.num_batches_tracked": torch.tensor(7),
        "fp8.weight": torch.tensor([1.0, -2.0]).to(FP8[0]),
        "int8.weight": torch.tensor([[1, 0], [-2, 0]], dtype=torch.int8),
    }
    floating = ["bn.weight", "fp8.weight"]
    spec = secateur.l1_unstructured("*", 1)
    assert list(client.prune(model, spec).masks) == floating
    assert list(client.report(model).tensors) == floating
    assert list(client.report(model, ["*.weight"]).tensors) == floating
    assert list(client.finalize(model).report.tensors) == floating
    for glob in ("*.num_batches_tracked", "int8.*"):
        with pytest.raises(secateur.InvalidSpec, match="matches no floating tensor"):
            client.prune(model, secateur.l1_unstructured(glob, 1))
        with pytest.raises(secateur.InvalidSpec, match="matches no floating tensor"):
            client.report(model, [glob])
    with pytest.raises(secateur.InvalidSpec, match=r"'int8.weight' is I8: .* named exactly"):
        client.report(model, "int8.*")
    names = ["int8.weight", "bn.num_batches_tracked", "bn.*"]
    report = client.report(model, names)
    assert list(report.tensors) == ["bn.weight", "bn.num_batches_tracked", "int8.weight"]
    found = report.tensors["int8.weight"]
    assert (found.zeros, found.total, found.zero_slices, found.dtype) == (2, 4, (0, 1), "I8")
    both = secateur.global_unstructured(["*.weight", "int8.weight"], 3)
    masks = client.prune(model, both).masks
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "bn.weight": [False, True],
        "fp8.weight": [True, True],
        "int8.weight": [[True, False], [True, False]],
    }


@every_dtype
def test_checkpoints_have_every_dtype(client: secateur.Client, dtype: torch.dtype) -> None:
    weight = numbers((50, 40), dtype)
    half = secateur.l1_unstructured("w", 0.5)
    checkpoint = client.prune({"w": weight}, half, keep=True).checkpoint
    assert checkpoint is not None
    (kept,) = lowest([weight], 1000)
    assert client.report(checkpoint, ["w"]).tensors["w"].pruned == 1000
    final = client.finalize(checkpoint).state_dict()
    assert_same_tensors(final, {"w": folded(weight, kept)})
    result = client.prune(checkpoint, half, output="reparametrized")
    (kept,) = lowest([weight], 1500)
    expected = {"w_orig": weight, "w_mask": kept.to(dtype)}
    assert_same_tensors(result.state_dict("reparametrized"), expected)


@every_dtype
def test_apply_to_gives_the_module_that_torch_prunes(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    weight = numbers((6, 5), dtype)
    module, twin = by_torch({"a.w": weight}), by_torch({"a.w": weight})
    result = client.prune(module, secateur.l1_unstructured("a.w", 12))
    result.apply_to(module)
    by_torch_prune.custom_from_mask(*place(twin, "a.w"), result.masks["a.w"])
    assert_same_tensors(module.state_dict(), twin.state_dict())
    ours, theirs = (vars(root.get_submodule("a"))["w"] for root in (module, twin))
    assert same_bits(ours, theirs)
    again = client.prune(module, secateur.l1_unstructured("a.w", 6), keep=True)
    (kept,) = lowest([weight], 18)
    assert_same_masks(again.masks, {"a.w": kept})


KINDS = pytest.mark.parametrize(
    "backend",
    [TorchBackend(CPU), NumbaBackend(CPU)],
    ids=lambda backend: type(backend).__name__,
)


@KINDS
@examples(100)
@given(weight=weights(), data=st.data())
def test_every_backend_counts_zeros_and_folds(
    backend: Backend, weight: Tensor, data: st.DataObject
) -> None:
    flat, size = weight.view(-1), weight.numel()
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    zero = flat.double() == 0
    assert backend.count_zeros(flat, None) == int(zero.sum())
    assert backend.count_zeros(flat, packed(kept).bits) == int((zero | ~kept).sum())
    found = flat.clone()
    backend.fold(found, packed(kept).bits)
    assert same_bits(found, folded(flat, kept))
    if weight.dtype in FP8:
        keys = [byte & 0x7F for byte in flat.view(torch.uint8).tolist()]
        assert backend.extremes(flat) == (min(keys), max(keys))


@pytest.mark.parametrize("is_sampled", [False, True])
@every_dtype
def test_the_search_for_many_units_gives_the_masks_of_a_sort(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_sampled: bool
) -> None:
    """More units than are sorted at once; with numba and without.

    With lower limits they are sampled as millions are.
    """
    if is_sampled:
        monkeypatch.setattr(select, "LARGE", sorted_keys.FEW)
        monkeypatch.setattr(select, "SAMPLE", 1 << 12)
    check_search(monkeypatch, dtype, sorted_keys.FEW + 5)


@pytest.mark.slow
@every_dtype
def test_the_search_for_millions_of_units_gives_the_masks_of_a_sort(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    check_search(monkeypatch, dtype, select.LARGE + 5)


def check_search(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    weight = numbers((count,), dtype)
    (kept,) = lowest([weight], count // 3)
    rule = Selection("r", ("w",), Magnitude(), Element(), "tensor", Count(count // 3))
    zeros = int(((weight.double() == 0) | ~kept).sum())
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "enabled", enabled)
        found, _ = prune(RequestContext(), {"w": Parameter(weight)}, [rule], {})
        mask = found["w"].mask
        assert mask is not None
        assert torch.equal(mask.bits, packed(kept).bits)
        assert measure(RequestContext(), found["w"]).zeros == zeros
