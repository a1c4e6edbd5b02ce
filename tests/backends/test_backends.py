"""The operations of each backend, compared with their definitions."""

import itertools
import math
import os
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.backends import kernels
from secateur_server.backends.keys import BITS
from secateur_server.backends.masks import any_of_slices, expand, kept_slices
from secateur_server.backends.norms import slice_norms
from secateur_server.backends.numba_backend import NumbaBackend
from secateur_server.backends.pieces import DIGIT_BITS, Piece, Stored
from secateur_server.backends.randomness import RandomScores
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.prune import prune
from secateur_server.granularity.element import Element
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.report.measure import measure
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.spec.rules import Scope, Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.masks import packed, unpacked

CPU = torch.device("cpu")
CONTEXT = RequestContext()
ALL: list[TorchBackend] = [TorchBackend(CPU), NumbaBackend(CPU)]
if os.environ.get("TRITON_INTERPRET") == "1":
    from secateur_server.backends.triton_backend import TritonBackend

    ALL.append(TritonBackend(CPU))
every_backend = pytest.mark.parametrize("backend", ALL, ids=lambda backend: type(backend).__name__)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
VALUES = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 1e-7, float("inf")]) | st.floats(-9, 9),
    min_size=1,
    max_size=50,
)
many = examples(60)


def test_numba_is_enabled() -> None:
    assert kernels.enabled


@st.composite
def pieces(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES
) -> tuple[Piece, list[float], Tensor]:
    """Draws a piece, the magnitudes of its units, and which of them are unpruned."""
    dtype, values = draw(dtypes), draw(VALUES)
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    flags = st.lists(st.booleans(), min_size=len(values), max_size=len(values))
    mask = draw(st.none() | flags.map(torch.tensor))
    unpruned = torch.ones(len(values), dtype=torch.bool) if mask is None else mask
    bits = None if mask is None else packed(mask).bits
    return Piece(len(values), Stored(scores), dtype, bits), scores.abs().double().tolist(), unpruned


@every_backend
@many
@given(
    width=st.sampled_from([1, 5, 8, 130, 131, 144, 300]),
    dtype=DTYPES,
    kind=st.sampled_from(["normal", "few values", "far apart", "zeros"]),
    kept=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 1 << 32),
)
def test_rows_are_cut_as_by_sorting_each(
    backend: TorchBackend, width: int, dtype: torch.dtype, kind: str, kept: float, seed: int
) -> None:
    rows, numbers = 8, torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=numbers, dtype=torch.float64)
    if kind == "few values":
        values = (values * 2).round() / 4
    elif kind == "far apart":  # keys of which most lie below those that a histogram tells apart
        values = torch.where(values > 1.5, values * 3e4, values * 2.0**-20)
    elif kind == "zeros":
        values = torch.where(values > 1, torch.inf, 0.0)
    scores = values.to(dtype)
    flags = torch.rand(rows, width, generator=numbers) < kept
    bits = None if kept == 1 else packed(flags).bits
    counts = (flags.sum(1) * torch.rand(rows, generator=numbers)).round().long()
    piece = Piece(rows * width, Stored(scores.view(-1)), dtype, bits)
    found = backend.unpack(backend.cut_rows(piece, counts.numpy()), piece.units).view(rows, width)
    for row in range(rows):
        order = scores[row].abs().double().sort(stable=True).indices
        lowest = order[flags[row][order]][: counts[row]]
        expected = flags[row].clone()
        expected[lowest] = False
        assert torch.equal(found[row], expected)


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(magnitude, dtype=torch.float64).to(dtype).view(BITS[dtype]))


@every_backend
@many
@given(drawn=pieces(), data=st.data())
def test_a_split_keeps_keys_above_and_finds_keys_within_the_bounds(
    backend: TorchBackend, drawn: tuple[Piece, list[float], Tensor], data: st.DataObject
) -> None:
    piece, magnitudes, unpruned = drawn
    low, high = sorted(data.draw(st.lists(st.sampled_from(magnitudes), min_size=2, max_size=2)))
    found = backend.split([piece], key_of(low, piece.dtype), key_of(high, piece.dtype))
    kept = found.kept
    expected = torch.tensor([m >= high for m in magnitudes]) & unpruned
    within = [i for i, m in enumerate(magnitudes) if low <= m < high and unpruned[i]]
    assert torch.equal(kept, packed(expected).bits)
    assert found.at.tolist() == within
    assert found.keys.tolist() == [key_of(magnitudes[i], piece.dtype) for i in within]
    assert backend.count_ones(kept) == found.above == int(expected.sum())
    size = len(within)
    more = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    backend.keep(kept, found.at, more.to(torch.bool))
    for place, is_kept in zip(within, more.tolist(), strict=True):
        expected[place] |= bool(is_kept)
    assert torch.equal(kept, packed(expected).bits)


@every_backend
@many
@given(dtype=DTYPES, data=st.data(), bounds=st.lists(st.floats(0, 9), min_size=2, max_size=2))
def test_pieces_are_split_as_one_by_one(
    backend: TorchBackend, dtype: torch.dtype, data: st.DataObject, bounds: list[float]
) -> None:
    several = [
        drawn[0] for drawn in data.draw(st.lists(pieces(st.just(dtype)), min_size=1, max_size=5))
    ]
    if dtype == torch.float32:
        scores = RandomScores(data.draw(st.integers(-(1 << 63), (1 << 63) - 1)))
        unpruned = packed(torch.arange(50) % 3 > 0).bits
        several += [
            Piece(50, scores, dtype, unpruned),
            *several[:1],
            Piece(50, scores, dtype, None),
        ]
    low, high = sorted(key_of(bound, dtype) for bound in bounds)
    found = backend.split(several, low, high)
    expected = [TorchBackend(CPU).split([piece], low, high) for piece in several]
    begins = itertools.accumulate((8 * len(part.kept) for part in expected), initial=0)
    assert torch.equal(found.kept, torch.cat([part.kept for part in expected]))
    assert torch.equal(found.keys, torch.cat([part.keys for part in expected]))
    assert found.at.tolist() == [
        begin + place
        for begin, part in zip(begins, expected, strict=False)
        for place in part.at.tolist()
    ]
    assert found.above == sum(part.above for part in expected)


@every_backend
@many
@given(drawn=pieces(), data=st.data())
def test_counts_and_extremes_are_those_of_the_definition(
    backend: TorchBackend, drawn: tuple[Piece, list[float], Tensor], data: st.DataObject
) -> None:
    piece, magnitudes, unpruned = drawn
    scores = piece.scores.stored
    assert scores is not None
    candidates = [m for m, lives in zip(magnitudes, unpruned.tolist(), strict=True) if lives]
    cut = data.draw(st.sampled_from(magnitudes))
    counts = sum(m < cut for m in candidates), candidates.count(cut)
    assert backend.count_below(piece, key_of(cut, piece.dtype)) == counts
    expected = key_of(min(magnitudes), piece.dtype), key_of(max(magnitudes), piece.dtype)
    assert backend.extremes(scores) == expected
    zeros = len(magnitudes) - sum(m != 0 for m in candidates)
    assert backend.count_zeros(scores, piece.unpruned) == zeros
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 60)))), dtype=torch.int64)
    sampled = [i for i in index.tolist() if i < len(magnitudes) and unpruned[i]]
    assert backend.sample(piece, index).tolist() == [
        key_of(magnitudes[i], piece.dtype) for i in sampled
    ]
    if candidates:
        place = data.draw(st.integers(1, len(candidates)))
        keys = torch.tensor([key_of(m, piece.dtype) for m in candidates], dtype=BITS[piece.dtype])
        assert backend.kth(keys, place) == key_of(sorted(candidates)[place - 1], piece.dtype)
        assert_ranked(backend, piece, magnitudes, unpruned, place)


def assert_ranked(
    backend: TorchBackend, piece: Piece, magnitudes: list[float], unpruned: Tensor, place: int
) -> None:
    """Compares the kept units with a stable sort. Pruned units stay pruned."""
    candidates = [i for i, lives in enumerate(unpruned.tolist()) if lives]
    order = sorted(candidates, key=lambda i: magnitudes[i])
    cut, mask = backend.rank(backend.keys(piece), place)
    at_cut = [i for i in candidates if magnitudes[i] == magnitudes[order[place - 1]]]
    assert mask.nonzero().view(-1).tolist() == sorted(order[place:])
    assert cut.key == key_of(magnitudes[order[place - 1]], piece.dtype)
    assert (cut.ties, cut.equal) == (len({*order[:place]} & {*at_cut}), len(at_cut))
    few, kept = backend.cut_few(RequestContext(), [piece], place)
    assert few == cut
    assert torch.equal(kept, packed(mask).bits)


@every_backend
@many
@given(dtype=DTYPES, data=st.data())
def test_several_pieces_are_cut_as_one(
    backend: TorchBackend, dtype: torch.dtype, data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(pieces(st.just(dtype)), min_size=2, max_size=5))
    magnitudes = [m for _, of_piece, _ in drawn for m in of_piece]
    candidates = [
        i for i, lives in enumerate(torch.cat([unpruned for *_, unpruned in drawn])) if lives
    ]
    assume(candidates)
    place = data.draw(st.integers(1, len(candidates)))
    order = sorted(candidates, key=lambda i: magnitudes[i])
    expected = torch.zeros(len(magnitudes), dtype=torch.bool)
    expected[order[place:]] = True
    cut, kept = backend.cut_few(RequestContext(), [piece for piece, *_ in drawn], place)
    at_cut = [i for i in candidates if magnitudes[i] == magnitudes[order[place - 1]]]
    assert cut.key == key_of(magnitudes[order[place - 1]], dtype)
    assert (cut.ties, cut.equal) == (len({*order[:place]} & {*at_cut}), len(at_cut))
    parts = torch.split(expected, [p.units for p, *_ in drawn])
    assert torch.equal(kept, torch.cat([packed(part).bits for part in parts]))


@every_backend
@many
@given(drawn=pieces(), data=st.data())
def test_digits_are_counted(
    backend: TorchBackend, drawn: tuple[Piece, list[float], Tensor], data: st.DataObject
) -> None:
    piece, magnitudes, unpruned = drawn
    keys = [key_of(m, piece.dtype) for m in magnitudes]
    bits = torch.iinfo(BITS[piece.dtype]).bits
    low_bits = data.draw(st.sampled_from(range(1, bits)))
    width = data.draw(st.integers(1, min(low_bits, DIGIT_BITS)))
    some = data.draw(st.sets(st.sampled_from(keys), min_size=1, max_size=3))
    prefixes = sorted({key >> low_bits for key in some})
    counts = torch.zeros(len(prefixes), 1 << width, dtype=torch.int64)
    wanted = torch.tensor(prefixes, dtype=BITS[piece.dtype])
    backend.count_digits(piece, wanted, low_bits - width, width, counts)
    candidates = [key for key, lives in zip(keys, unpruned.tolist(), strict=True) if lives]
    for prefix, found in zip(prefixes, counts, strict=True):
        digits = [
            (key >> low_bits - width) % (1 << width)
            for key in candidates
            if key >> low_bits == prefix
        ]
        expected = torch.bincount(torch.tensor(digits, dtype=torch.int64), minlength=1 << width)
        assert torch.equal(found, expected)


@every_backend
@many
@given(drawn=pieces())
def test_a_fold_is_the_product_with_the_mask(
    backend: TorchBackend, drawn: tuple[Piece, list[float], Tensor]
) -> None:
    piece, _, unpruned = drawn
    scores = piece.scores.stored
    assert scores is not None
    folded = scores.clone()
    backend.fold(folded, packed(unpruned).bits)
    zeros = torch.copysign(torch.zeros_like(scores), scores)
    product = torch.where(unpruned, scores, zeros)
    assert torch.equal(folded.view(BITS[piece.dtype]), product.view(BITS[piece.dtype]))


@every_backend
@many
@given(drawn=pieces(), extra=st.sampled_from([1.0, 1.7]))
def test_magnitudes_are_counted_in_bins(
    backend: TorchBackend, drawn: tuple[Piece, list[float], Tensor], extra: float
) -> None:
    piece, magnitudes, unpruned = drawn
    assert piece.scores.stored is not None
    largest = extra * max((x for x in magnitudes if math.isfinite(x)), default=0.0)
    expected = [[7] * 12, [7] * 12]
    for x, is_kept in zip(magnitudes, unpruned.tolist(), strict=True):
        place = 11
        if math.isfinite(x):
            place = 1 + min(int(x / largest * 10), 9) if x else 0
        expected[not is_kept][place] += 1
    counts = np.full((2, 12), 7)
    backend.count_magnitudes(piece.scores.stored, piece.unpruned, largest, counts)
    assert counts.tolist() == expected


@every_backend
@many
@given(data=st.data(), sizes=st.tuples(st.integers(1, 20), st.integers(1, 90)))
def test_bits_are_counted_in_pixels(
    backend: TorchBackend, data: st.DataObject, sizes: tuple[int, int]
) -> None:
    rows, columns = (data.draw(st.integers(1, size)) for size in sizes)
    height, width = (data.draw(st.integers(1, size)) for size in (rows, columns))
    begin, end = sorted(data.draw(st.integers(0, rows * columns)) for _ in "ab")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    whole = torch.rand(sizes, generator=generator) < 0.6
    expected = np.full((height, width), 3)
    for i in range(begin, end):
        pixel_of = [
            max(p for p in range(pixels) if p * length // pixels <= at)
            for at, length, pixels in zip(
                divmod(i, columns), (rows, columns), (height, width), strict=True
            )
        ]
        expected[tuple(pixel_of)] += bool(whole[divmod(i, columns)])
    counts = np.full((height, width), 3)
    bits = packed(whole.view(-1)).bits
    backend.count_pixels(bits, begin, end, sizes[1], rows, columns, counts)
    assert counts.tolist() == expected.tolist()


@every_backend
@many
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 1, 2, 5])),
    st.sampled_from([0.003, 0.05, 0.5, 0.95]),
    st.integers(0, 1 << 30),
)
def test_the_structure_of_lines_of_bits(
    backend: TorchBackend, sizes: tuple[int, int, int], density: float, seed: int
) -> None:
    whole = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < density
    lines = backend.lines(packed(whole.view(-1)).bits, sizes)
    flags = whole.movedim(1, 2).reshape(-1, sizes[1])
    assert torch.equal(lines, torch.stack([packed(line).bits for line in flags]))
    most = [
        max(int(line[i : i + m].sum()) for line in flags for i in range(0, sizes[1], m))
        for m in (2, 4, 8, 16)
    ]
    assert backend.most_ones(lines) == most
    wider = torch.cat([lines, lines], 1)[:, : lines.shape[1]]  # its lines are not contiguous
    assert backend.most_ones(wider) == most
    blocks = [
        sum(
            bool(flags[row : row + side, column : column + side].any())
            for row in range(0, len(flags), side)
            for column in range(0, flags.shape[1], side)
        )
        for side in (4, 8, 16, 32)
    ]
    assert backend.nonzero_blocks(lines) == backend.nonzero_blocks(wider) == blocks


@many
@given(state=st.integers(-(1 << 63), (1 << 63) - 1), begin=st.integers(0, 1 << 40))
def test_random_keys_are_the_same_in_every_backend(state: int, begin: int) -> None:
    piece = Piece(50, RandomScores(state, begin), torch.float32, None)
    found = [backend.split([piece], 1 << 28, 1 << 29) for backend in ALL]
    for part in found[1:]:
        assert torch.equal(part.keys, found[0].keys)
        assert part.at.tolist() == found[0].at.tolist()
        assert torch.equal(part.kept, found[0].kept)


SHAPES = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@many
@given(shape=SHAPES, data=st.data(), piece=st.sampled_from([8, 16, 1 << 20]))
def test_masks_of_slices_and_of_elements(shape: list[int], data: st.DataObject, piece: int) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[dim]
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    along = [-1 if d == dim % len(shape) else 1 for d in range(len(shape))]
    whole = kept.view(along).expand(shape)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(size)) > 0.8
    flags = noise.reshape(-1)
    with pytest.MonkeyPatch.context() as small:
        small.setattr(TorchBackend, "piece", piece)
        mask = expand(RequestContext(), kept, shape, dim)
        found = any_of_slices(
            RequestContext(), lambda begin, end: flags[begin:end], shape, dim, CPU
        )
        by_mask = kept_slices(RequestContext(), packed(noise), shape, dim)
    assert torch.equal(by_mask, found)
    assert torch.equal(unpacked(Parameter(torch.empty(shape), mask)), whole)
    assert torch.equal(found, noise.movedim(dim, 0).flatten(1).any(1) if noise.dim() > 1 else noise)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Each dtype, both scopes, and all or none of the units; the other combinations take long.
CUTS = [(dtype, index % 2 == 0, 0.3) for index, dtype in enumerate(FLOATS)]
CUTS += [(torch.float32, True, 0.0), (torch.float64, False, 1.0)]
OTHER_CUTS = sorted({*product(FLOATS, (True, False), (0.0, 0.3, 0.5, 1.0))} - {*CUTS}, key=str)


@pytest.mark.parametrize(
    ("dtype", "is_global", "fraction"),
    [*CUTS, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in OTHER_CUTS)],
    ids=str,
)
def test_masks_and_reports_are_the_same_without_numba(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_global: bool, fraction: float
) -> None:
    """More units than are sorted at once, with ties, some of them pruned before."""
    torch.manual_seed(0)
    weights = [torch.randn(300, 700).mul(50).round().div(50).to(dtype) for _ in range(2)]
    parameters = {
        "a": Parameter(weights[0]),
        "b": Parameter(weights[1], packed(torch.rand(300, 700) > 0.2)),
    }
    scope: Scope = "global" if is_global else "tensor"
    rules = [
        Selection("r", ("a", "b"), importance, Element(), scope, Fraction(fraction), {})
        for importance in (Magnitude(), Random(5))
    ]
    expected, outcomes = prune(RequestContext(), parameters, rules, {})
    measures = [measure(RequestContext(), parameter) for parameter in expected.values()]
    monkeypatch.setattr(kernels, "enabled", False)
    found, found_outcomes = prune(RequestContext(), parameters, rules, {})
    assert found_outcomes == outcomes
    assert [measure(RequestContext(), parameter) for parameter in found.values()] == measures
    for name, parameter in found.items():
        assert torch.equal(unpacked(parameter), unpacked(expected[name]))


@examples(100)
@given(DTYPES, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 2]), st.integers(0, 99))
def test_norms_have_the_same_bits_without_numba(
    dtype: torch.dtype, rows: int, columns: int, p: int, seed: int
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.3
    for dim, kept in ((0, None), (1, None), (0, mask), (-1, mask)):
        bits = None if kept is None else packed(kept)
        found = slice_norms(RequestContext(), values, bits, dim, float(p))
        with pytest.MonkeyPatch.context() as without:
            without.setattr(kernels, "enabled", False)
            assert torch.equal(found, slice_norms(RequestContext(), values, bits, dim, float(p)))
        whole = values.double() if kept is None else values.double() * kept
        norms = torch.linalg.vector_norm(whole, p, dim=1 - dim % 2)
        assert torch.allclose(found.double(), norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(600, 700), (40, 30, 20, 20), (3, 150_000), (150_000, 3)])
def test_zero_slices_of_large_tensors_are_counted(shape: tuple[int, ...]) -> None:
    """In tensors so large that a corner of each slice is checked first."""
    torch.manual_seed(0)
    assert math.prod(shape) > 1 << 17
    weight, mask = torch.randn(shape), torch.rand(shape) > 0.9
    for dim, size in enumerate(shape):
        index = torch.randperm(size)[: size // 3]
        weight.index_fill_(dim, index[: len(index) // 2], 0)
        mask.index_fill_(dim, index[len(index) // 2 :], False)
    found = measure(RequestContext(), Parameter(weight, packed(mask)))
    zero = (weight == 0) | ~mask
    assert (found.zeros, found.pruned) == (int(zero.sum()), int((~mask).sum()))
    assert found.zero_slices == tuple(
        int(zero.movedim(dim, 0).flatten(1).all(1).sum()) for dim in range(len(shape))
    )
