"""Reports: what they count, and how a person sees them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import secateur
from tests.conftest import examples

SPARSE = {
    "conv.weight": np.array([[[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], np.float32),
    "<bias>": np.array([-0.0, 2.0, 3.0]),
    "half": np.zeros((), np.float16),
    "steps": np.array([0, 0]),
}


def test_a_report_counts_every_floating_tensor(client: secateur.Client) -> None:
    report = client.report(SPARSE)
    assert list(report.tensors) == ["conv.weight", "<bias>", "half"]
    assert (report.zeros, report.total) == (7 + 1 + 1, 8 + 3 + 1)
    assert report.sparsity == 9 / 12
    conv, half = report.tensors["conv.weight"], report.tensors["half"]
    assert (conv.zero_slices, conv.bytes, conv.dtype) == ((1, 1, 1), 32, "F32")
    assert (half.shape, half.zero_slices, half.sparsity) == ((), (), 1.0)
    assert not report.is_pruned
    assert report.rules == ()


def test_a_report_takes_names_and_globs(client: secateur.Client) -> None:
    assert list(client.report(SPARSE, "half").tensors) == ["half"]
    assert list(client.report(SPARSE, ["*", "half"]).tensors) == ["conv.weight", "<bias>", "half"]
    assert list(client.report(SPARSE, ["h*", "conv.weight"]).tensors) == ["conv.weight", "half"]
    assert list(client.report(SPARSE, ["steps", "h*"]).tensors) == ["half", "steps"]
    flags = {**SPARSE, "flags": np.array([True])}
    with pytest.raises(secateur.InvalidSpec, match=r"'flags' cannot be pruned.*BOOL"):
        client.report(flags, ["half", "flags"])


def test_a_pair_is_reported_with_its_mask(client: secateur.Client) -> None:
    pair = {"w_orig": np.array([1.0, 0.0, 3.0]), "w_mask": np.array([0.0, 1.0, 1.0])}
    report = client.report(pair)
    tensor = report.tensors["w"]
    assert (tensor.zeros, tensor.pruned, tensor.is_pruned) == (2, 1, True)
    assert report.is_pruned
    assert secateur.is_pruned(pair)
    final = client.finalize(pair)
    assert not final.report.is_pruned
    assert (final.report.zeros, final.report.tensors["w"].pruned) == (2, 0)
    assert not secateur.is_pruned(final.state_dict())


def test_finalize_folds_the_named_tensors(client: secateur.Client) -> None:
    ones = {"a_orig": np.ones(2), "a_mask": np.array([0.0, 1.0])}
    ones |= {"b_orig": np.ones(2), "b_mask": np.array([1.0, 0.0])}
    final = client.finalize(ones, tensors="a")
    assert list(final.state_dict()) == ["a", "b_orig", "b_mask"]
    assert list(final.report.tensors) == ["a"]


def test_a_prune_reports_what_its_spec_named(client: secateur.Client) -> None:
    model = {"a": np.arange(10.0), "b": np.arange(10.0)}
    report = client.prune(model, secateur.l1_unstructured("a", 0.5)).report
    assert list(report.tensors) == ["a"]
    assert report.sparsity == 0.5
    ((choice,),) = report.rules
    assert (choice.tensors, choice.candidates, choice.requested) == (("a",), 10, 5)
    assert (choice.pruned, choice.threshold) == (5, 4.0)
    assert (choice.ties, choice.ties_pruned) == (1, 1)


def test_zeros_that_no_mask_claims_are_counted_but_not_as_pruned(client: secateur.Client) -> None:
    model = {"a": np.array([0.0, 0.0, 1.0, 2.0])}
    tensor = client.prune(model, secateur.l1_unstructured("a", 1)).report.tensors["a"]
    assert (tensor.zeros, tensor.pruned) == (2, 1)


def test_digests_tell_inputs_and_outputs_apart(client: secateur.Client) -> None:
    half = secateur.l1_unstructured("a", 0.5)
    first = client.prune({"a": np.arange(8.0)}, half).report
    again = client.prune({"a": np.arange(8.0)}, half).report
    other = client.prune({"a": np.arange(8.0) + 1}, half, output="none").report
    assert first.input_blake3 == again.input_blake3 != other.input_blake3
    assert first.output_blake3 == again.output_blake3
    assert len(first.output_blake3) == 64
    assert other.output_blake3 == ""


@examples(60)
@given(
    st_numpy.arrays(
        np.float32,
        st_numpy.array_shapes(max_dims=4, max_side=4, min_dims=0),
        elements=st.sampled_from([0.0, -0.0, 0.0, 1.5, -2.0]),
    )
)
def test_counts_are_those_of_torch(
    client: secateur.Client, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> None:
    found = client.report({"w": array}).tensors["w"]
    tensor = torch.from_numpy(array)
    assert found.zeros == tensor.numel() - int(torch.count_nonzero(tensor))
    dims = range(tensor.dim()) if tensor.dim() > 1 else ()
    expected = tuple(
        sum(not part.any() for part in tensor.unbind(dim)) if tensor.numel() else 0 for dim in dims
    )
    assert found.zero_slices == expected
    assert found.shape == array.shape
    assert math.isclose(found.sparsity, found.zeros / found.total)


def test_a_report_is_a_table(client: secateur.Client) -> None:
    lines = str(client.report(SPARSE)).splitlines()
    assert lines[0].split() == [
        *("tensor", "shape", "dtype", "bytes", "zeros", "total", "sparsity", "zero", "slices")
    ]
    assert (
        lines[1].split() == ["conv.weight", "2x2x2", "F32", "32", "7", "8", "87.50%"] + ["1/2"] * 3
    )
    assert lines[3].split() == ["half", "scalar", "F16", "2", "1", "1", "100.00%"]
    assert lines[-1].split() == ["total", "58", "9", "12", "75.00%"]
    assert len({line.index("%") for line in lines[1:]}) == 1  # columns line up


def test_every_report_says_how_much_of_the_model_it_covers(client: secateur.Client) -> None:
    """Floating tensors count, a pair once; integers and masks do not."""
    model = {f"w{i:02}": np.ones(i + 1) for i in range(14)} | {"steps": np.ones(99, np.int64)}
    model |= {"p_orig": np.ones(50), "p_mask": np.ones(50)}
    largest = ("p", *(f"w{i:02}" for i in range(13, 4, -1)))
    pruned = client.prune(model, secateur.l1_unstructured(["w04", "steps"], 0.5)).report
    assert pruned.coverage == secateur.Coverage(5, 105 + 50 - 5, 14, largest)
    report = client.report(model, "w04")
    assert report.coverage == client.finalize(model, "w04").report.coverage == pruned.coverage
    assert str(report).endswith("covers 5 of 155 floating parameters; not p, w13, w12 and 11 more")
    whole = client.report(model)
    assert whole.coverage == secateur.Coverage(155, 0, 0, ())
    assert "covers" not in str(whole)
    assert report.to_dict()["coverage"]["uncovered"] == 150


def test_specs_and_results_are_shown_in_one_line(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("conv.*", 0.5) + secateur.custom_from_mask({"half": [True]})
    assert str(spec).startswith('Spec(selection { tensors: "conv.*" ')
    assert str(spec).endswith("; custom_masks { } arrays: half)")
    result = client.prune(SPARSE, secateur.l1_unstructured("conv.*", 0.5))
    assert repr(result) == "PruneResult(7 zeros of 8 elements in 1 tensor, output='masks')"
    assert repr(client.finalize(SPARSE)) == "FinalizeResult(9 zeros of 12 elements in 3 tensors)"


def test_a_notebook_shows_a_table_with_names_escaped(client: secateur.Client) -> None:
    shown = client.report(SPARSE)._repr_html_()
    assert shown.startswith("<table ")
    assert ">&lt;bias&gt;</th>" in shown
    assert "<bias>" not in shown
    assert shown.count("<tr>") == 5


def test_an_empty_state_dict_has_an_empty_report(client: secateur.Client) -> None:
    report = client.report({})
    assert (report.total, report.sparsity) == (0, 0.0)
