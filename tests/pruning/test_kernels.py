"""The compiled passes beside torch's operations, and beside the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur_server.pruning import kernels, passes
from secateur_server.pruning.measure import measure
from secateur_server.pruning.prune import prune
from secateur_server.pruning.score import Ranking, slice_norms
from secateur_server.pruning.spec import Element, Magnitude, Parameter, Random, Selection, Slice

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
VALUES = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 1e-7, float("inf")]) | st.floats(-9, 9),
    min_size=1,
    max_size=50,
)


def test_numba_is_there_so_that_these_tests_mean_something() -> None:
    assert kernels.enabled


def piece_of(scores: torch.Tensor, alive: torch.Tensor | None) -> passes.Piece:
    ranking = Ranking("w", len(scores), scores, alive, scores.device)
    return passes.Piece(ranking, scores.dtype, 0, len(scores))


@settings(deadline=None, max_examples=200)
@given(DTYPES, VALUES, st.data())
def test_each_pass_is_what_it_is_defined_as(
    dtype: torch.dtype, values: list[float], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    flags = st.lists(st.booleans(), min_size=len(values), max_size=len(values))
    alive = data.draw(st.none() | flags.map(torch.tensor))
    piece = piece_of(scores, alive)
    assert piece.compiled() is not None
    living = torch.ones(len(values), dtype=torch.bool) if alive is None else alive
    cut = data.draw(st.sampled_from(scores.abs().tolist()))
    ties = data.draw(st.none() | st.integers(0, 5))
    key = int(torch.tensor(cut, dtype=dtype).view(kernels.BITS[dtype]))
    at_cut = ((scores.abs() == cut) & living).nonzero().view(-1)
    assert passes.count_equal(piece, key) == len(at_cut)
    expected = (scores.abs() > cut) & living
    if ties is not None:
        expected[at_cut[ties:]] = True
    kept = torch.empty(len(values), dtype=torch.bool)
    assert passes.mark(piece, key, ties, kept) == int(expected.sum())
    assert torch.equal(kept, expected)


@settings(deadline=None, max_examples=100)
@given(DTYPES, VALUES, st.data())
def test_digits_are_counted_as_torch_counts_them(
    dtype: torch.dtype, values: list[float], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    piece = piece_of(scores, None)
    keys = passes.keys(piece).tolist()
    bits = torch.iinfo(kernels.BITS[dtype]).bits
    shift = data.draw(st.sampled_from(range(0, bits, 16)))
    prefix = data.draw(st.sampled_from([key >> (shift + 16) for key in keys]))
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    passes.add_digits(piece, prefix, shift, counts)
    expected = [key >> shift & 0xFFFF for key in keys if key >> (shift + 16) == prefix]
    assert torch.equal(counts, torch.bincount(torch.tensor(expected), minlength=1 << 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_global", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_masks_and_measures_are_the_same_without_numba(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_global: bool, fraction: float
) -> None:
    """More units than are ranked at once, with ties, and a part of them pruned before."""
    torch.manual_seed(0)
    weights = [torch.randn(300, 700).mul(50).round().div(50).to(dtype) for _ in range(2)]
    parameters = {
        "a": Parameter(weights[0]),
        "b": Parameter(weights[1], torch.rand(300, 700) > 0.2),
    }
    rules = [
        Selection("r", ("a", "b"), importance, Element(), is_global, fraction, {})
        for importance in (Magnitude(), Random(5))
    ]
    expected, outcomes = prune(parameters, rules, {})
    measures = [measure(parameter) for parameter in expected.values()]
    monkeypatch.setattr(kernels, "enabled", False)
    found, found_outcomes = prune(parameters, rules, {})
    assert found_outcomes == outcomes
    assert [measure(parameter) for parameter in found.values()] == measures
    for name, parameter in found.items():
        mask, wanted = parameter.mask, expected[name].mask
        assert mask is not None
        assert wanted is not None
        assert torch.equal(mask, wanted)


@settings(deadline=None, max_examples=100)
@given(DTYPES, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 2]), st.integers(0, 99))
def test_norms_are_the_same_bits_without_numba(
    dtype: torch.dtype, rows: int, columns: int, p: int, seed: int
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.3
    for dim, kept in ((0, None), (1, None), (0, mask), (-1, mask)):
        found = slice_norms(values, kept, Slice(dim), float(p))
        with pytest.MonkeyPatch.context() as without:
            without.setattr(kernels, "enabled", False)
            assert torch.equal(found, slice_norms(values, kept, Slice(dim), float(p)))
        whole = values.double() if kept is None else values.double() * kept
        norms = torch.linalg.vector_norm(whole, p, dim=1 - dim % 2)
        assert torch.allclose(found.double(), norms, rtol=1e-6, atol=0)
