"""Outputs: torch's result in every bit, in every form."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.literals import Form
from tests.conftest import examples
from tests.reference import (
    BITS,
    EXACT,
    HALF,
    Step,
    all_l1,
    assert_same_masks,
    assert_same_tensors,
    by_torch,
    custom,
    distinct,
    l1,
    ln,
    module_of,
    place,
    prune,
    same_bits,
)

ALL = [*EXACT, *HALF]
FORMS: list[Form] = ["dense", "reparametrized"]

every_dtype = pytest.mark.parametrize("dtype", ALL, ids=str)
every_form = pytest.mark.parametrize("form", FORMS)


def any_bits(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits of every kind of number except NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    values = bits.to(BITS[dtype.itemsize]).view(dtype)
    values = torch.where(values.isnan(), -0.0, values)
    values[::7] = (
        torch.tensor([0.0, -0.0, 1, -1, math.inf, -math.inf])
        .to(dtype)
        .repeat(count)[: len(values[::7])]
    )
    return values


def removed_by_torch(tensors: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
    """Prunes with torch, makes that permanent, and returns the state_dict."""
    module = by_torch(tensors, step)
    for name in tensors:
        part, leaf = place(module, name)
        if hasattr(part, f"{leaf}_mask"):
            prune.remove(part, leaf)
    return module.state_dict()


def random_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: distinct(t.shape, seed=4) > 0 for n, t in tensors.items()}


@every_dtype
def test_dense_is_the_result_of_torchs_remove(client: secateur.Client, dtype: torch.dtype) -> None:
    tensors = {"a.w": any_bits(600, dtype, 0).view(20, 30), "b": any_bits(77, dtype, 1)}
    masks = random_masks(tensors)
    # A pruned infinity is NaN in torch, so infinities are kept.
    masks = {n: mask | tensors[n].isinf() for n, mask in masks.items()}
    expected = removed_by_torch(tensors, custom(masks))
    for output in ("masks", "reparametrized", "dense"):
        result = client.prune(tensors, custom(masks).spec, output=output)
        assert_same_tensors(result.state_dict("dense"), expected)


@every_dtype
def test_finalize_is_the_result_of_torchs_remove(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    tensors = {"a.w": distinct((20, 30), dtype), "b": distinct((77,), dtype, seed=1)}
    step = ln(["a.w"], 0.5, 2, 1) + l1(["a.w", "b"], 0.5)
    module = by_torch(tensors, step)
    expected = removed_by_torch(tensors, step)
    assert_same_tensors(client.finalize(module).state_dict(), expected)
    assert_same_tensors(client.finalize(module.state_dict()).state_dict(), expected)


@every_dtype
def test_a_pruned_infinity_or_nan_becomes_zero(client: secateur.Client, dtype: torch.dtype) -> None:
    """A documented difference: torch multiplies, and inf * 0 is NaN."""
    weight = torch.tensor([math.inf, -math.inf, math.nan, -1.0, 2.0, math.inf], dtype=dtype)
    mask = torch.tensor([0, 0, 0, 0, 0, 1])
    step = custom({"w": mask})
    assert int(removed_by_torch({"w": weight}, step)["w"].isnan().sum()) == 3
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, math.inf], dtype=dtype)
    for output in ("masks", "reparametrized", "dense"):
        result = client.prune({"w": weight}, step.spec, output=output)
        assert same_bits(result.state_dict("dense")["w"], zeros)
    pair = client.prune({"w": weight}, step.spec).state_dict("reparametrized")
    assert same_bits(client.finalize(pair).state_dict()["w"], zeros)


@every_dtype
def test_kept_elements_keep_every_bit_even_of_a_nan(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    weight = any_bits(4096, dtype, 0)
    odd = torch.arange(1, 9, dtype=BITS[dtype.itemsize])  # payloads of NaNs
    weight[:8] = (torch.full((8,), math.nan, dtype=dtype).view(odd.dtype) ^ odd).view(dtype)
    spec = secateur.custom_from_mask({"w": torch.ones(4096)})
    outputs: tuple[Form, ...] = ("masks", "reparametrized", "dense")
    for output in outputs:
        for form in FORMS if output == "masks" else [output]:
            tensors = client.prune({"w": weight}, spec, output=output).state_dict(form)
            assert same_bits(tensors["w" if form == "dense" else "w_orig"], weight)


@every_dtype
def test_reparametrized_is_the_state_dict_of_torchs_module(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    tensors = {"a.w": distinct((20, 30), dtype), "a.b": distinct((20,), dtype), "c": torch.ones(3)}
    step = l1(["a.w"], 0.5) + ln(["a.w"], 3, math.inf, 1)
    if dtype in HALF:
        step = custom(random_masks({"a.w": tensors["a.w"]}))
    expected = by_torch(tensors, step).state_dict()
    for output in ("masks", "reparametrized"):
        result = client.prune(tensors, step.spec, output=output)
        assert_same_tensors(result.state_dict("reparametrized"), expected)


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
UNPRUNABLE = [torch.bool, torch.complex64]
OTHERS = [torch.int64, torch.int32, torch.uint8, *UNPRUNABLE, *FP8]


def others() -> dict[str, Tensor]:
    """Tensors that no rule names."""
    values = (torch.arange(-3, 5) * 16).view(2, 4)
    named = {f"of.{str(dtype).partition('.')[2]}": values.to(dtype) for dtype in OTHERS}
    return {**named, "count": torch.tensor(7)}


@every_form
def test_other_dtypes_are_returned_unchanged(client: secateur.Client, form: Any) -> None:
    source = {"w": distinct((4, 4)), **others()}
    for output in ("masks", form):
        result = client.prune(source, secateur.l1_unstructured("w", 0.5), output=output)
        found = result.state_dict(form)
        assert_same_tensors({name: found[name] for name in others()}, others())
    pairs = client.prune(source, secateur.l1_unstructured("w", 0.5)).state_dict("reparametrized")
    final = client.finalize(pairs).state_dict()
    assert_same_tensors({name: final[name] for name in others()}, others())


@every_form
def test_a_pair_of_another_dtype_is_two_tensors(client: secateur.Client, form: Any) -> None:
    source = {"w": distinct((4, 4))}
    for name, values in others().items():
        if values.dtype in UNPRUNABLE:
            source |= {f"{name}_orig": values, f"{name}_mask": (values == 16).to(values.dtype)}
    others_of = source.keys() - {"w"}
    for output in (form, "masks"):
        result = client.prune(source, secateur.l1_unstructured("w", 0.5), output=output)
        found = result.state_dict(form)
        assert found.keys() >= others_of, output
        assert_same_tensors({n: found[n] for n in others_of}, {n: source[n] for n in others_of})
    assert_same_tensors(client.finalize(source).state_dict(), source)


@pytest.mark.parametrize("dtype", [*ALL, torch.int64, torch.bool], ids=str)
@every_form
def test_empty_tensors_are_returned(client: secateur.Client, dtype: torch.dtype, form: Any) -> None:
    empty = {"e": torch.zeros(0, dtype=dtype), "f": torch.zeros(3, 0, 2, dtype=dtype)}
    source = {"w": distinct((4,)), **empty}
    for output in ("masks", form):
        found = client.prune(source, secateur.l1_unstructured("w", 2), output=output).state_dict(
            form
        )
        assert_same_tensors({name: found[name] for name in empty}, empty)
    assert_same_tensors(client.finalize(source).state_dict(), source)


@st.composite
def sources(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draws tensors of all dtypes, some of them pairs."""
    source: dict[str, Tensor] = {}
    for name in draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)):
        shape = draw(st.lists(st.integers(1, 5), max_size=3))
        dtype = draw(st.sampled_from(ALL))
        weight = distinct(shape, dtype, draw(st.integers(0, 99)))
        if draw(st.booleans()):
            mask = distinct(shape, seed=draw(st.integers(0, 99))) > 0
            source[f"{name}_orig"] = weight
            source[f"{name}_mask"] = mask.to(
                draw(st.sampled_from([dtype, torch.bool, torch.int64]))
            )
        else:
            source[name] = weight
    if draw(st.booleans()):
        source["count"] = torch.tensor(3)
    return source


def named(source: dict[str, Tensor]) -> list[str]:
    """Returns the names that a spec can have."""
    bases = [name.removesuffix("_orig") for name in source if not name.endswith("_mask")]
    return [name for name in bases if name != "count"]


@examples(100)
@given(source=sources(), data=st.data())
def test_the_outputs_of_one_request_agree(
    client: secateur.Client, source: dict[str, Tensor], data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(named(source)), min_size=1, unique=True))
    spec = all_l1(names, data.draw(st.floats(0, 1))).spec
    masks = client.prune(source, spec)
    for form in FORMS:
        wired = client.prune(source, spec, output=form)
        local = masks.state_dict(form)
        assert_same_tensors(local, wired.state_dict(form))
        assert list(local) == list(wired.state_dict(form)), "the order"
        assert wired.report.tensors == masks.report.tensors
    assert_same_masks(client.prune(source, spec, output="reparametrized").masks, masks.masks)
    assert client.prune(source, spec, output="none").report.tensors == masks.report.tensors


@examples(50)
@given(source=sources(), data=st.data())
def test_outputs_are_the_tensors_times_the_masks(
    client: secateur.Client, source: dict[str, Tensor], data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(named(source)), min_size=1, unique=True))
    result = client.prune(source, secateur.l1_unstructured(names, data.draw(st.floats(0, 1))))
    dense, pairs = result.state_dict("dense"), result.state_dict("reparametrized")
    assert result.masks.keys() == set(names)
    for name, mask in result.masks.items():
        weight = source.get(f"{name}_orig", source.get(name))
        assert weight is not None
        assert same_bits(pairs[f"{name}_orig"], weight)
        assert same_bits(pairs[f"{name}_mask"], mask.to(weight.dtype))
        assert same_bits(dense[name], weight * mask)
    unnamed = [name for name in named(source) if name not in names and f"{name}_orig" in source]
    for name in unnamed:  # a pair is folded, or is still a pair
        kept = source[f"{name}_mask"] != 0
        assert same_bits(dense[name], source[f"{name}_orig"] * kept)
        assert same_bits(pairs[f"{name}_mask"], kept.to(source[f"{name}_orig"].dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@every_form
def test_arrays_are_returned_as_arrays_with_the_same_bits(
    client: secateur.Client, dtype: type, form: Any
) -> None:
    weights: dict[str, Any] = {
        f"w{i}": distinct((9, 7), seed=i).numpy().astype(dtype) for i in (0, 1)
    }
    arrays = {**weights, "count": np.array(3), "flags": np.array([True, False])}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    spec = secateur.global_unstructured(["w0", "w1"], 0.5)
    expected = client.prune(tensors, spec, output=form).state_dict(form)
    for output in ("masks", form):
        found = client.prune(arrays, spec, output=output).state_dict(form)
        assert all(isinstance(value, np.ndarray) for value in found.values())
        assert_same_tensors({n: torch.from_numpy(value) for n, value in found.items()}, expected)


@every_form
def test_the_buffers_of_a_module_are_in_the_result(client: secateur.Client, form: Any) -> None:
    module = module_of({"w": distinct((6, 5)), "b": distinct((6,))})
    module.register_buffer("mean", torch.randn(3))
    module.register_buffer("count", torch.tensor(3))
    spec = secateur.l1_unstructured("w", 0.5)
    local = client.prune(module, spec).state_dict(form)
    assert_same_tensors(local, client.prune(module, spec, output=form).state_dict(form))
    for name in ("mean", "count"):
        assert same_bits(local[name], module.get_buffer(name))


@every_form
def test_buffers_with_the_names_of_a_pair_are_returned_unchanged(
    client: secateur.Client, form: Any
) -> None:
    module = module_of({"w": distinct((6, 5))})
    module.register_buffer("x_orig", torch.tensor([1.0, 2.0, 3.0]))
    module.register_buffer("x_mask", torch.tensor([0.0, 1.0, 1.0]))
    for output in (form, "masks"):
        result = client.prune(module, secateur.l1_unstructured("w", 0.5), output=output)
        found = result.state_dict(form)
        assert found.keys() >= {"x_orig", "x_mask"}, output
        assert same_bits(found["x_orig"], module.get_buffer("x_orig"))
        assert same_bits(found["x_mask"], module.get_buffer("x_mask"))


@pytest.mark.parametrize("taken", ["w_orig", "w_mask"])
@pytest.mark.parametrize("output", ["masks", "reparametrized"])
def test_a_name_of_a_pair_that_exists_already_is_an_error(
    client: secateur.Client, taken: str, output: Any
) -> None:
    source = {"w": distinct((4,)), taken: distinct((4,), seed=1)}
    with pytest.raises(secateur.InvalidStateDict, match=taken):
        client.prune(source, secateur.l1_unstructured("w", 2), output=output).state_dict(
            "reparametrized"
        )
    dense = client.prune(source, secateur.l1_unstructured("w", 2)).state_dict("dense")
    assert same_bits(dense[taken], source[taken])
