"""Details of reports, compared with loops and numpy over the whole tensor."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from tests.conftest import examples

Flags = npt.NDArray[np.bool_]
FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64]
SHAPES = [(), (1,), (9000,), (1, 7), (70, 3), (2, 5000), (5000, 2), (130, 4, 3), (6, 5, 3, 3)]
# Of several images, of three, and of more than one piece.
LARGE = [(500, 460), (3000, 90), (40, 30000), (1200, 1000)]
# Most bytes of the pixels of one tensor.
PIXEL_BYTES = 100_000


def check_histogram(found: secateur.Histogram, weight: Tensor, kept: Flags) -> None:
    magnitudes = np.abs(weight.double().numpy()).reshape(-1)
    finite = magnitudes[np.isfinite(magnitudes)]
    largest = finite.max(initial=0)
    assert found.largest == largest
    assert found.zeros == (magnitudes == 0).sum()
    assert found.non_finite == len(magnitudes) - len(finite)
    for counts, flags in (found.kept, kept), (found.pruned, ~kept):
        counted = magnitudes[flags.reshape(-1) & np.isfinite(magnitudes) & (magnitudes > 0)]
        places = np.minimum(np.floor(counted / (largest or 1) * 128).astype(int), 127)
        assert counts.tolist() == np.bincount(places, minlength=128).tolist()


def check_groups(found: secateur.TensorDetails, nonzero: Flags) -> None:
    lines = np.moveaxis(nonzero, min(1, nonzero.ndim - 1), -1)
    lines = lines.reshape(-1, lines.shape[-1])
    assert list(found.groups) == [2, 4, 8, 16]
    for m, counts in found.groups.items():
        padded = np.pad(lines, ((0, 0), (0, -lines.shape[1] % m)))
        sums = padded.reshape(-1, m).sum(1)
        assert counts.tolist() == np.bincount(sums, minlength=m + 1).tolist()
        assert found.share(m // 2, m) == (sums <= m // 2).mean()


def check_images(images: tuple[secateur.Image, ...], nonzero: Flags) -> None:
    matrix = nonzero.reshape(len(nonzero), -1) if nonzero.ndim > 1 else nonzero[None]
    if nonzero.all():
        assert images == ()
        return
    assert (images[0].rows, images[0].columns) == matrix.shape
    *coarse, single = images
    assert np.array_equal(single.pixels, matrix[: single.rows, : single.columns])
    for image in coarse:
        assert image.pixels.dtype == np.uint8
        check_shares(image, matrix[: image.rows, : image.columns])
    # Each image shows less of the matrix than the one before, with fewer elements in a pixel.
    for before, behind in pairwise(images):
        assert behind.rows <= before.rows
        assert behind.columns <= before.columns
        ratios = [i.rows * i.columns / i.pixels.size for i in (before, behind)]
        assert ratios[0] > ratios[1]
    assert (len(images) == 1) == (single.pixels.shape == matrix.shape)
    sizes = [image.pixels.size for image in coarse]
    assert sum(sizes) + single.pixels.size / 8 <= PIXEL_BYTES


def check_shares(image: secateur.Image, shown: Flags) -> None:
    begins = [
        np.arange(pixels) * length // pixels
        for pixels, length in zip(image.pixels.shape, shown.shape, strict=True)
    ]

    def sums(values: Any) -> Any:
        by_row = np.add.reduceat(values.astype(np.int64), begins[0], axis=0)
        return np.add.reduceat(by_row, begins[1], axis=1)

    shares = sums(shown) / sums(np.ones_like(shown))
    assert np.array_equal(image.pixels == 0, shares == 0)
    assert np.array_equal(image.pixels == 255, shares == 1)
    rounded = np.abs(image.pixels - 255 * shares) <= 0.5 + 1e-9
    assert (rounded | (image.pixels == 1) | (image.pixels == 254)).all()
    assert (np.abs(image.pixels - 255 * shares) <= 1).all()


def check_slices(found: Mapping[int, Flags], nonzero: Flags) -> None:
    expected = {}
    for dim in range(nonzero.ndim if nonzero.ndim > 1 else 0):
        is_zero = ~nonzero.any(axis=tuple(other for other in range(nonzero.ndim) if other != dim))
        if is_zero.any():
            expected[dim] = is_zero.tolist()
    assert {dim: flags.tolist() for dim, flags in found.items()} == expected


def check(
    details: secateur.TensorDetails | None,
    weight: Tensor,
    kept: Tensor | None = None,
    sent: Tensor | None = None,
) -> None:
    """Compares details with their definitions.

    weight: Before masks were applied.  kept: The mask.  sent: The result, if it is smaller.
    """
    assert details is not None
    flags = np.ones(tuple(weight.shape), np.bool_) if kept is None else kept.bool().numpy()
    check_histogram(details.histogram, weight, flags)
    nonzero = (weight.double() != 0).numpy() & flags if sent is None else (sent != 0).numpy()
    nonzero = nonzero.reshape(nonzero.shape or (1,))
    check_groups(details, nonzero)
    check_images(details.images, nonzero)
    check_slices(details.zero_slices, nonzero)


@st.composite
def tensors(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor | None]:
    """Draws a tensor with zeros, single and in slices, perhaps infinities, and perhaps a mask."""
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-6, 1.0, 50.0]))
    values *= torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
    if len(shape) > 1 and draw(st.booleans()):
        values[draw(st.integers(0, shape[0] - 1))] = 0
        values[:, draw(st.integers(0, shape[1] - 1))] = 0
    if dtype in FLOATING and values.numel() and draw(st.booleans()):
        values.view(-1)[0] = -math.inf
    weight = values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    if len(shape) > 1:
        kept[:, : shape[1] // 2] &= draw(st.booleans())
    return weight, draw(st.sampled_from([None, kept]))


def check_reported(client: secateur.Client, weight: Tensor, kept: Tensor | None) -> None:
    source = {"w": weight}
    if kept is not None:
        source = {"w_orig": weight, "w_mask": kept.to(weight.dtype)}
    report = client.report(source, "w", details=True)
    check(report.tensors["w"].details, weight, kept)
    assert report == client.report(source, "w")
    assert report.to_dict() == client.report(source, "w").to_dict()


@examples(100)
@given(tensors(SHAPES))
def test_details_of_a_report(client: secateur.Client, drawn: tuple[Tensor, Tensor | None]) -> None:
    check_reported(client, *drawn)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_details_of_large_tensors(
    client: secateur.Client, shape: tuple[int, ...], data: st.DataObject
) -> None:
    check_reported(client, *data.draw(tensors([shape])))


@pytest.mark.parametrize("output", ["masks", "dense", "reparametrized", "packed", "none"])
def test_a_prune_counts_weights_as_they_were_before(client: secateur.Client, output: Any) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    source = {"a": weight, "b": weight[:3].clone(), "other": weight.clone()}
    spec = secateur.ln_structured("a", 5, n=2, dim=0) + secateur.l1_unstructured("*[ab]", 0.5)
    masks = client.prune(source, spec).masks
    found = client.prune(source, spec, output=output, details=True).report
    assert list(found.tensors) == ["a", "b"]
    for name, tensor in found.tensors.items():
        check(tensor.details, source[name], torch.as_tensor(masks[name]))
    (choice, _) = found.rules[1]
    details = found.tensors["a"].details
    assert details is not None
    assert choice.threshold is not None
    last = int(choice.threshold / details.histogram.largest * 128)
    assert details.histogram.pruned[last] > 0  # so the threshold lies in this bin


def test_checkpoints_and_finalize(client: secateur.Client) -> None:
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    spec = secateur.l1_unstructured("w", 0.7)
    uploaded = client.upload({"w": weight})
    result = client.prune(uploaded, spec, keep=True, details=True)
    assert result.checkpoint is not None
    kept = client.prune({"w": weight}, spec).masks["w"]
    for report in (
        result.report,
        client.report(result.checkpoint, details=True),
        client.finalize(result.checkpoint, details=True).report,
        client.finalize({"w_orig": weight, "w_mask": kept.float()}, details=True).report,
    ):
        check(report.tensors["w"].details, weight, kept)
    client.delete(result.checkpoint)
    client.delete(uploaded)


def test_a_shrunk_result_shows_the_smaller_tensors(client: secateur.Client) -> None:
    generator = torch.Generator().manual_seed(2)
    source = {"a": torch.randn(300, 700, generator=generator), "b": torch.randn(8, 300)}
    source["a"][:, 5] = 0
    group = secateur.group("g", secateur.member("a", 0), secateur.member("b", 1))
    spec = secateur.grouped([group], 0.5, align=1) + secateur.l1_unstructured("a", 0.3)
    kept = client.prune(source, spec, output="masks").masks["a"]
    result = client.prune(source, spec, output="shrunk", details=True)
    smaller = result.state_dict()["a"]
    assert smaller.shape == (150, 700)
    details = result.report.tensors["a"].details
    check(details, source["a"], kept, smaller)
    assert details is not None
    assert details.zero_slices[1].nonzero()[0].tolist() == [5]


def test_names_of_tied_tensors(client: secateur.Client) -> None:
    weight = torch.nn.Parameter(torch.eye(5))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 5), "b": torch.nn.Linear(5, 5)})
    model["a"].weight = model["b"].weight = weight
    report = client.report(model, "*.weight", details=True)
    (tensor,) = report.tensors.values()
    assert tensor.aliases == ("b.weight",)
    check(tensor.details, weight.detach())


def test_no_details_without_elements_and_unless_asked_for(client: secateur.Client) -> None:
    source = {"w": torch.eye(3), "empty": torch.zeros(0, 4)}
    report = client.report(source, details=True)
    assert [t.details is None for t in report.tensors.values()] == [False, True]
    assert [t.details for t in client.report(source).tensors.values()] == [None, None]
    json.dumps(report.to_dict())
    assert "details" not in report.to_dict()["tensors"]["w"]
