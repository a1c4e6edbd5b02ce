"""Blocks and N:M groups, compared with their definitions as plain loops."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

from secateur_server.backends import kernels
from secateur_server.backends.kernels_units import COUNTED, KEYS
from secateur_server.backends.masks import Mask
from secateur_server.backends.numba_backend import NumbaBackend
from secateur_server.backends.pieces import Stored
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import select
from secateur_server.errors import DimOutOfRange, NotStructured
from secateur_server.granularity.block import Block
from secateur_server.granularity.element import Element
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.runtime.context import RequestContext
from tests.conftest import examples
from tests.masks import packed

CONTEXT = RequestContext()
CPU = torch.device("cpu")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = st.sampled_from([*FLOATS, torch.float8_e4m3fn, torch.int8, torch.int64])
ORDERS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, -1.0, math.inf, -math.inf])
SEEDS = st.integers(0, 1 << 32)
Units = Block | NM | Slice
some = examples(50)


@dataclass(frozen=True)
class Drawn:
    """A tensor with many ties, which of its elements are unpruned, and a kind of units."""

    values: Tensor
    unpruned: Tensor
    mask: Mask | None
    units: Units


@st.composite
def blocks(draw: st.DrawFn, shape: list[int]) -> Block:
    as_matrix = len(shape) > 1 and draw(st.booleans())
    dims = 2 if as_matrix else len(shape)
    lengths = draw(st.lists(st.integers(0, 5), min_size=dims, max_size=dims).filter(any))
    return Block(tuple(lengths), as_matrix)


@st.composite
def groups(draw: st.DrawFn, shape: list[int]) -> NM:
    m = draw(st.integers(2, 9))
    dims = len(shape)
    return NM(draw(st.integers(1, m - 1)), m, draw(st.integers(-dims, dims - 1)))


@st.composite
def slices(draw: st.DrawFn, shape: list[int]) -> Slice:
    return Slice(draw(st.integers(-len(shape), len(shape) - 1)))


@st.composite
def tensors(draw: st.DrawFn, *kinds: object) -> Drawn:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    make = draw(st.sampled_from(kinds or (blocks, groups)))
    units = draw(make(shape))  # type: ignore[operator]
    generator = torch.Generator().manual_seed(draw(SEEDS))
    values = torch.randn(shape, generator=generator).mul(4).round().div(2)
    dtype = draw(DTYPES)
    if dtype in FLOATS:
        values[torch.rand(shape, generator=generator) < 0.05] = -math.inf
    values = values.mul(2).to(dtype) if not dtype.is_floating_point else values.to(dtype)
    if draw(st.booleans()):
        return Drawn(values, torch.ones(shape, dtype=torch.bool), None, units)
    unpruned = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.6, 0.9]))
    return Drawn(values, unpruned, packed(unpruned), units)


def members(units: Units, shape: tuple[int, ...]) -> Iterator[list[int]]:
    """Yields the flat indices of the elements of each unit, row-major, by the definition."""
    index = np.arange(math.prod(shape)).reshape(shape)
    if isinstance(units, Block):
        index = index.reshape(shape[0], -1) if units.as_matrix else index
        steps = [length or size for length, size in zip(units.shape, index.shape, strict=True)]
    else:
        steps = [1] * len(shape) if isinstance(units, NM) else list(shape)
        steps[units.dim] = units.m if isinstance(units, NM) else 1
    begins = (range(0, size, step) for size, step in zip(index.shape, steps, strict=True))
    for first in itertools.product(*begins):
        unit = index[tuple(slice(b, b + s) for b, s in zip(first, steps, strict=True))]
        yield unit.reshape(-1).tolist()


def lost_with(drawn: Drawn) -> list[list[int]]:
    """Returns for each unit the unpruned elements that are pruned with it."""
    magnitudes = drawn.values.to(torch.float64).abs().view(-1).tolist()
    unpruned = drawn.unpruned.view(-1).tolist()
    found = []
    for unit in members(drawn.units, drawn.values.shape):
        lost = [i for i in unit if unpruned[i]]
        if isinstance(drawn.units, NM):
            lost = sorted(lost, key=lambda i: (magnitudes[i], i))
            lost = lost[: max(0, len(lost) - drawn.units.n)]
        found.append(sorted(lost))
    return found


def candidates(drawn: Drawn) -> list[bool]:
    return [len(lost) > 0 for lost in lost_with(drawn)]


def flags_of(mask: Mask) -> list[bool]:
    return [bool(mask.bits[i // 8] >> (i % 8) & 1) for i in range(mask.elements)]


@pytest.fixture(scope="module", params=[64, 1 << 20])
def small_pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pieces that split a tensor into many tiles, or that hold it whole."""
    with pytest.MonkeyPatch.context() as small:
        small.setattr(TorchBackend, "piece", request.param)
        yield


in_pieces = pytest.mark.usefixtures("small_pieces")


@in_pieces
@some
@given(drawn=tensors())
def test_units_and_candidates_are_those_of_the_definition(drawn: Drawn) -> None:
    units, shape = drawn.units, drawn.values.shape
    expected = candidates(drawn)
    units.check("rule", "w", shape)
    assert math.prod(units.grid(shape)) == len(expected)
    found = units.candidates(CONTEXT, drawn.values, drawn.mask)
    assert (flags_of(found) if found else [True] * len(expected)) == expected
    if drawn.mask is None and isinstance(units, Block):
        assert found is None
    sizes = {len(unit) for unit in members(units, shape)}
    whole = isinstance(units, Block) and len(sizes) == 1
    assert units.unit_elements(shape) == (sizes.pop() if whole else None)


def test_grids_have_the_shapes_that_the_contract_defines() -> None:
    shape = (6, 7, 3, 3)
    assert Block((4, 3, 0, 0), False).grid(shape) == (2, 3, 1, 1)
    assert Block((4, 16), True).grid(shape) == (2, 4)
    assert NM(2, 4, 1).grid(shape) == (6, 2, 3, 3)
    assert NM(2, 4, -1).grid(shape) == (6, 7, 3, 1)


@in_pieces
@some
@given(drawn=tensors(), p=ORDERS, is_mean=st.booleans())
def test_scores_are_norms_of_the_elements_of_a_unit(drawn: Drawn, p: float, is_mean: bool) -> None:
    found = drawn.units.scores(CONTEXT, drawn.values, drawn.mask, p, is_mean)
    wide = drawn.values.dtype in (torch.float64, torch.int64)
    assert found.dtype == (torch.float64 if wide else torch.float32)
    masked = torch.where(drawn.unpruned, drawn.values.to(torch.float64), 0.0).view(-1)
    whole, lost = list(members(drawn.units, drawn.values.shape)), lost_with(drawn)
    of_units = lost if isinstance(drawn.units, NM) else whole
    expected = candidates(drawn)
    assert len(found) == len(expected)
    assert not found.isnan().any()
    for unit, score, is_candidate in zip(of_units, found.tolist(), expected, strict=True):
        if not is_candidate:
            continue
        norm = float(torch.linalg.vector_norm(masked[unit], p))
        if is_mean and math.isfinite(p):
            norm /= len(unit) ** (1 / p) if p else len(unit)
        assert score == pytest.approx(norm, rel=1e-12 if wide else 1e-7, abs=0)


@in_pieces
@some
@given(drawn=tensors(), seed=SEEDS)
def test_units_expand_to_their_elements(drawn: Drawn, seed: int) -> None:
    lost = lost_with(drawn)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(len(lost), generator=generator) < seed % 3 / 2  # none, some, all
    expected = drawn.unpruned.view(-1).clone()
    for unit, is_kept in zip(lost, kept.tolist(), strict=True):
        expected[unit] &= is_kept
    found = drawn.units.expand(CONTEXT, packed(kept), drawn.values, drawn.mask)
    both = found if drawn.mask is None else found.both(CONTEXT, drawn.mask)
    assert flags_of(both) == expected.tolist()
    assert both.kept(CONTEXT) == int(expected.sum())


@in_pieces
@some
@given(drawn=tensors(blocks, groups, slices), seed=SEEDS)
def test_costs_are_those_of_the_elements_of_a_unit(drawn: Drawn, seed: int) -> None:
    """The elements are compared by scores, which differ from the weights."""
    weight = torch.randn(drawn.values.shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.to(drawn.values.dtype)
    counts, squares = drawn.units.costs(CONTEXT, weight, drawn.values, drawn.mask)
    assert (counts.dtype, squares.dtype) == (torch.int64, torch.float64)
    of_elements = weight.to(torch.float64).square().view(-1)
    lost = lost_with(drawn)
    assert counts.tolist() == [len(unit) for unit in lost]
    expected = [float(of_elements[unit].sum()) for unit in lost]
    assert squares.tolist() == pytest.approx(expected, rel=1e-12)


@in_pieces
@some
@given(drawn=tensors(), p=st.sampled_from([1.0, 2.0, math.inf]), data=st.data())
def test_a_selection_prunes_exactly_the_count(drawn: Drawn, p: float, data: st.DataObject) -> None:
    units, values = drawn.units, drawn.values
    scores = units.scores(CONTEXT, values, drawn.mask, p, True)
    mask = units.candidates(CONTEXT, values, drawn.mask)
    unpruned = [i for i, is_candidate in enumerate(candidates(drawn)) if is_candidate]
    count = data.draw(st.integers(0, len(unpruned)))
    ranking = Ranking("w", len(scores), Stored(scores), mask, CPU)
    (kept,), _ = select(CONTEXT, [ranking], len(unpruned), count)
    assert kept.kept(CONTEXT) == len(unpruned) - count
    pruned = sorted(unpruned, key=lambda i: (float(scores[i]), i))[:count]
    lost = lost_with(drawn)
    expected = drawn.unpruned.view(-1).clone()
    expected[[i for unit in pruned for i in lost[unit]]] = False
    before = packed(drawn.unpruned)
    assert (
        flags_of(units.expand(CONTEXT, kept, values, drawn.mask).both(CONTEXT, before))
        == expected.tolist()
    )


@in_pieces
@some
@given(drawn=tensors(groups))
def test_pruning_all_units_keeps_at_most_n_of_m(drawn: Drawn) -> None:
    assert isinstance(drawn.units, NM)
    none = packed(torch.zeros(drawn.units.grid(drawn.values.shape), dtype=torch.bool))
    found = flags_of(
        drawn.units.expand(CONTEXT, none, drawn.values, drawn.mask).both(
            CONTEXT, packed(drawn.unpruned)
        )
    )
    unpruned = drawn.unpruned.view(-1).tolist()
    for unit in members(drawn.units, drawn.values.shape):
        count = sum(unpruned[i] for i in unit)
        assert sum(found[i] for i in unit) == min(count, drawn.units.n)


@in_pieces
@some
@given(drawn=tensors(), p=ORDERS.filter(lambda p: p != 0.5), seed=SEEDS)
def test_scores_masks_and_costs_have_the_same_bits_without_numba(
    drawn: Drawn, p: float, seed: int
) -> None:
    units, mask = drawn.units, drawn.mask
    grid = units.grid(drawn.values.shape)
    kept = packed(torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.5)

    def everything() -> list[Tensor]:
        return [
            units.scores(CONTEXT, drawn.values, mask, p, True),
            units.expand(CONTEXT, kept, drawn.values, mask).bits,
            *units.costs(CONTEXT, drawn.values, drawn.values, mask),
        ]

    found = everything()
    with pytest.MonkeyPatch.context() as without:
        without.setattr(kernels, "enabled", False)
        for one, other in zip(found, everything(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("m", [2, 3, 16, COUNTED, COUNTED + 1, 1024])
@pytest.mark.parametrize("inner", [1, 7])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_each_backend_finds_the_largest_keys_of_groups(
    m: int, inner: int, dtype: torch.dtype
) -> None:
    """More groups than are compared at once. The key of a pruned element is -1."""
    torch.manual_seed(m)
    keys = torch.randint(-1, 2 * m, (2 * KEYS // (m * inner) + 3, m, inner), dtype=dtype)
    place = torch.arange(m).view(1, m, 1)
    order = (keys.to(torch.int64) * m + place).argsort(1, descending=True)  # without ties
    for n in (1, m // 2, m - 1, m):
        expected = torch.zeros(keys.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)
        for backend in (TorchBackend(CPU), NumbaBackend(CPU)):
            assert torch.equal(backend.largest(keys, n), expected)


def test_2_of_4_is_the_mask_of_torch() -> None:
    torch.manual_seed(0)
    module: Any = torch.nn.Linear(64, 48)
    sparsifier: Any = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(module, [{"tensor_fqn": "weight"}])
    sparsifier.step()
    expected = module.parametrizations.weight[0].mask.bool()
    weight = module.parametrizations.weight.original.detach()
    assert all(len(set(group)) == 4 for group in weight.abs().view(-1, 4).tolist())
    none = packed(torch.zeros(48, 16, dtype=torch.bool))
    assert flags_of(NM(2, 4, 1).expand(CONTEXT, none, weight, None)) == expected.view(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [NM(2, 4, 1), NM(2, 4, 0), Block((16, 16), False)])
def test_scores_of_large_tensors_in_many_tiles(units: NM | Block, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(640, 1200).to(dtype)
    scores = units.scores(CONTEXT, values, None, 1.0, False)
    if isinstance(units, Block):
        tiles = values.double().abs().unfold(0, 16, 16).unfold(1, 16, 16)
        torch.testing.assert_close(scores.double(), tiles.sum((2, 3)).view(-1), rtol=1e-6, atol=0)
        return
    tiles = values.double().abs().unfold(units.dim, 4, 4)
    sums = tiles.sort(-1).values[..., :2].sum(-1)
    torch.testing.assert_close(scores.double(), sums.view(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("units", "shape", "field", "why"),
    [
        (Block((2, 2), False), (4, 4, 4), "block", "3 lengths, not 2"),
        (Block((2, 2, 2), True), (4, 4, 4), "block", "2 lengths, not 3"),
        (Block((2, 2), True), (4,), "block", "2 dimensions or more; name only such tensors"),
        (NM(2, 4, 0), (), "dim", "a pattern needs a dimension"),
        (NM(2, 4, 1), (4,), "dim", "1 is not in [-1, 1); name only tensors that have it"),
        (NM(2, 4, 2), (4, 4), "dim", "2 is not in [-2, 2)"),
        (NM(2, 4, -3), (4, 4), "dim", "-3 is not in [-2, 2)"),
        (NM(2, 4, 1), (4,), "dim", "if t.ndim >= 2]"),
        (NM(2, 4, -3), (4, 4), "dim", "if t.ndim >= 3]"),
        (Slice(0), (4,), "dim", "2 dimensions or more"),
        (Slice(-3), (4, 4), "dim", "-3 is not in [-2, 2)"),
    ],
)
def test_a_tensor_without_such_units_is_refused(
    units: Units, shape: tuple[int, ...], field: str, why: str
) -> None:
    with pytest.raises((NotStructured, DimOutOfRange), match=re.escape(why)) as refused:
        units.check("rule", "w", shape)
    assert refused.value.field == f"rule.{field}"
    assert "'w'" in refused.value.description


@pytest.mark.parametrize(
    ("units", "shape", "grid"),
    [
        (Element(), (), ()),
        (Element(), (4, 0), (4, 0)),
        (Slice(-1), (4, 6), (6,)),
    ],
)
def test_the_grid_of_elements_and_slices(
    units: Element | Slice, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    units.check("rule", "w", shape)
    assert math.prod(units.grid(shape)) == math.prod(grid)
