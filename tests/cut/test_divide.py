"""Division of a total among tensors, and the energy that it removes, against plain sorting."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.backends import kernels
from secateur_server.backends.keys import BITS
from secateur_server.backends.numba_backend import NumbaBackend
from secateur_server.backends.pieces import Cut, Scores, Stored
from secateur_server.backends.protocol import Backend
from secateur_server.backends.randomness import RandomScores, random_keys, random_scores
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut import energy as of_energy
from secateur_server.cut import observe as of_observe
from secateur_server.cut import search as of_search
from secateur_server.cut import sorted_keys
from secateur_server.cut.allocation.lamp import search_by_lamp
from secateur_server.cut.drivers.local import Local
from secateur_server.cut.energy import energies
from secateur_server.cut.observe import observe_key
from secateur_server.cut.score import Ranking, score_dtype
from secateur_server.cut.search import Division, Query, search
from secateur_server.cut.select import NO_CUT, select
from secateur_server.errors import Cancelled
from secateur_server.runtime.context import RequestContext
from tests.conftest import examples
from tests.masks import packed

CPU = torch.device("cpu")
KINDS = st.sampled_from([TorchBackend(CPU), NumbaBackend(CPU)])
DTYPES = st.sampled_from(
    [*(torch.float64, torch.float32, torch.float16, torch.bfloat16), torch.float8_e5m2, torch.int8]
)
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 2.0**-14]
DRIVER = Local(NumbaBackend(CPU))
many = examples(100)

# The keys of the unpruned units of each ranking.
Keys = list[list[int]]


@st.composite
def drawn_rankings(draw: st.DrawFn) -> list[Ranking]:
    count = draw(st.integers(1, 4))
    is_random = draw(st.booleans())
    dtypes = [draw(DTYPES)] * count if draw(st.booleans()) else [draw(DTYPES) for _ in range(count)]
    return [draw(drawn_ranking(i, is_random, dtype)) for i, dtype in enumerate(dtypes)]


@st.composite
def drawn_ranking(draw: st.DrawFn, i: int, is_random: bool, dtype: torch.dtype) -> Ranking:
    numbers = [*NUMBERS] if dtype == torch.int8 else [*NUMBERS, float("inf")]
    values = draw(st.lists(st.sampled_from(numbers) | st.floats(-9, 9), max_size=40))
    flags = st.lists(st.booleans(), min_size=len(values), max_size=len(values))
    candidates = draw(st.none() | flags.map(torch.tensor))
    stored = Stored(torch.tensor(values, dtype=torch.float64).to(dtype))
    scores: Scores = random_scores(i, "w") if is_random else stored
    return Ranking(
        f"{i}", len(values), scores, None if candidates is None else packed(candidates), CPU
    )


def unpruned_of(ranking: Ranking) -> Tensor:
    every = torch.ones(ranking.units, dtype=torch.bool)
    return every if ranking.candidates is None else ranking.candidates.flags(0, ranking.units)


def all_keys(ranking: Ranking, dtype: torch.dtype) -> Tensor:
    """Returns the keys of all units of a ranking, pruned ones too."""
    if isinstance(ranking.scores, RandomScores):
        return random_keys(ranking.scores, torch.arange(ranking.units))
    return ranking.values.to(dtype).abs().view(BITS[dtype])


def unpruned_keys(rankings: Sequence[Ranking], dtype: torch.dtype) -> Keys:
    return [all_keys(ranking, dtype)[unpruned_of(ranking)].tolist() for ranking in rankings]


@st.composite
def drawn_query(draw: st.DrawFn, keys: Keys) -> Query:
    some = st.lists(st.sampled_from(range(len(keys))), min_size=1, unique=True)
    members = tuple(draw(some))
    pairs = [sorted(draw(st.tuples(*[st.integers(0, len(keys[m]))] * 2))) for m in members]
    is_bound = draw(st.booleans())
    lowest = tuple(low if is_bound else 0 for low, _ in pairs)
    highest = tuple(
        h if is_bound else len(keys[m]) for m, (_, h) in zip(members, pairs, strict=True)
    )
    size = len(members)
    prices = st.lists(st.sampled_from([0, 0.5, 1, 3, 7.25]), min_size=size, max_size=size)
    costs = draw(st.none() | prices.map(tuple))
    most = sum(c * h for c, h in zip(costs or (1,) * size, highest, strict=True))
    # The largest possible target is limited by every bound.
    target = draw(st.integers(0, int(most)) | st.just(most))
    return Query(members, lowest, highest, target, costs)


def brute(keys: Keys, query: Query) -> Division:
    """Divides by the definition, key by key and unit by unit."""
    of = [keys[member] for member in query.members]
    costs = query.costs or (1,) * len(of)

    def is_enough(counts: Sequence[int]) -> bool:
        return sum(c * n for c, n in zip(costs, counts, strict=True)) >= query.target

    def within(is_pruned: Callable[[int], bool]) -> list[int]:
        counts = [sum(map(is_pruned, of_one)) for of_one in of]
        bounds = zip(counts, query.lowest, query.highest, strict=True)
        return [min(max(n, low), high) for n, low, high in bounds]

    if is_enough(query.lowest):
        return Division(query.lowest, -1, (0,) * len(of), (0,) * len(of))
    every = sorted({key for of_one in of for key in of_one})
    cut = next(t for t in every if is_enough(within(lambda key: key <= t)))  # noqa: B023
    counts, most = within(lambda key: key < cut), within(lambda key: key <= cut)
    for i in range(len(of)):
        while counts[i] < most[i] and not is_enough(counts):
            counts[i] += 1
    below = tuple(sum(key < cut for key in of_one) for of_one in of)
    return Division(tuple(counts), cut, below, tuple(of_one.count(cut) for of_one in of))


@many
@given(KINDS, drawn_rankings(), st.data())
def test_divisions_are_those_of_the_definition(
    backend: Backend, rankings: list[Ranking], data: st.DataObject
) -> None:
    dtype = score_dtype(rankings)
    keys = unpruned_keys(rankings, dtype)
    queries = data.draw(st.lists(drawn_query(keys), min_size=1, max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchBackend, "piece", data.draw(st.sampled_from([8, 16, 1 << 20])))
        patch.setattr(of_observe, "LEAST_BITS", data.draw(st.sampled_from([1, 5, 8, 16])))
        patch.setattr(of_observe, "MOST_COUNTS", data.draw(st.sampled_from([1, 100, 1 << 24])))
        patch.setattr(of_search, "FEW", data.draw(st.sampled_from([0, 1 << 17])))
        patch.setattr(sorted_keys, "MOST_UNITS", data.draw(st.sampled_from([0, 1 << 22])))
        found = search(RequestContext(), Local(backend), rankings, queries, dtype)
    assert found == [brute(keys, query) for query in queries]


@many
@given(KINDS, drawn_rankings(), st.data())
def test_units_below_a_key_are_counted(
    backend: Backend, rankings: list[Ranking], data: st.DataObject
) -> None:
    dtype = score_dtype(rankings)
    keys = unpruned_keys(rankings, dtype)
    key = data.draw(st.sampled_from([0, 1 << 14, *(key for of in keys for key in of)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchBackend, "piece", data.draw(st.sampled_from([8, 1 << 20])))
        members = [ranking.pieces(dtype, backend.piece) for ranking in rankings]
        counts = observe_key(RequestContext(), Local(backend), members, key)
    found = [(sum(b for b, _ in of), sum(e for _, e in of)) for of in counts]
    assert found == [(sum(k < key for k in of), of.count(key)) for of in keys]


@many
@given(drawn_rankings(), st.data())
def test_a_division_without_bounds_has_the_counts_of_a_selection(
    rankings: list[Ranking], data: st.DataObject
) -> None:
    dtype = score_dtype(rankings)
    candidates = tuple(int(unpruned_of(ranking).sum()) for ranking in rankings)
    count = data.draw(st.integers(0, sum(candidates)))
    members = tuple(range(len(rankings)))
    (division,) = search(
        RequestContext(),
        DRIVER,
        rankings,
        [Query(members, (0,) * len(candidates), candidates, count)],
        dtype,
    )
    masks, cut = select(RequestContext(), rankings, sum(candidates), count)
    assert division.counts == tuple(
        n - mask.kept(RequestContext()) for n, mask in zip(candidates, masks, strict=True)
    )
    if count:
        ties = sum(division.counts) - sum(division.below)
        assert cut == Cut(division.key, ties, sum(division.equal))
    else:
        assert (cut, division.key) == (NO_CUT, -1)


@many
@given(KINDS, drawn_rankings(), st.data())
def test_energies_are_sums_of_squares_of_the_pruned_weights(
    backend: Backend, rankings: list[Ranking], data: st.DataObject
) -> None:
    ranking, dtype = rankings[0], score_dtype(rankings)
    weight = torch.randn(ranking.units, generator=torch.Generator().manual_seed(0))
    weight = (weight * 50).to(data.draw(DTYPES))
    keys, candidates = all_keys(ranking, dtype).tolist(), unpruned_of(ranking).tolist()
    order = sorted((i for i, unpruned in enumerate(candidates) if unpruned), key=keys.__getitem__)
    counts = data.draw(st.lists(st.integers(0, len(order)), max_size=6))
    squares = [value**2 for value in weight.double().tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_energy, "PART", data.draw(st.sampled_from([8, 24, 1 << 20])))
        cuts = [cut_of([keys[i] for i in order], count) for count in counts]
        found, whole = energies(RequestContext(), Local(backend), ranking, weight, cuts, dtype)
    expected = [math.fsum(squares[i] for i in order[:count]) for count in counts]
    assert found == pytest.approx(expected, rel=1e-12, abs=0)
    assert whole == pytest.approx(math.fsum(squares[i] for i in order), rel=1e-12, abs=0)


def cut_of(ordered: Sequence[int], count: int) -> Cut:
    """Returns the cut that prunes the first `count` of sorted keys."""
    if count == 0:
        return NO_CUT
    key = ordered[count - 1]
    return Cut(key, count - ordered.index(key), ordered.count(key))


@pytest.fixture(scope="module", params=[torch.float64, torch.float32])
def large(request: pytest.FixtureRequest) -> list[Ranking]:
    """Tensors larger than a piece, with ties, one of them partly pruned."""
    generator = torch.Generator().manual_seed(0)
    rankings = []
    for i, units in enumerate([1_100_001, 1_050_003]):
        values = torch.randn(units, generator=generator, dtype=torch.float64).to(request.param)
        values[: units // 2] = values[: units // 2].mul(50).round().div(50)
        candidates = None if i == 0 else packed(torch.rand(units, generator=generator) > 0.2)
        rankings.append(Ranking(f"{i}", units, Stored(values), candidates, CPU))
    return rankings


FRACTIONS = [0.001, 0.1, 0.25, 0.5, 0.503, 0.9, 1.0]


def test_many_cuts_of_large_tensors_are_those_of_a_sort(large: list[Ranking]) -> None:
    dtype = score_dtype(large)
    keys = [all_keys(ranking, dtype)[unpruned_of(ranking)] for ranking in large]
    owner = torch.cat([torch.full_like(of, i) for i, of in enumerate(keys)])
    joined = torch.cat(keys)
    ordered, index = joined.sort(stable=True)
    candidates = tuple(map(len, keys))
    counts = [round(share * len(joined)) for share in FRACTIONS]
    for division, count in zip(
        search(
            RequestContext(),
            DRIVER,
            large,
            [Query((0, 1), (0, 0), candidates, n) for n in counts],
            dtype,
        ),
        counts,
        strict=True,
    ):
        assert division.counts == tuple(owner[index[:count]].bincount(minlength=2).tolist())
        assert division.key == ordered[count - 1]
        assert division.below == tuple(int((of < division.key).sum()) for of in keys)
        assert division.equal == tuple(int((of == division.key).sum()) for of in keys)


def test_energies_of_large_tensors_are_those_of_a_sort(large: list[Ranking]) -> None:
    """The scores are not the weights, so ties have different squares."""
    ranking, dtype = large[1], score_dtype(large)
    weight = torch.randn(ranking.units, generator=torch.Generator().manual_seed(1))
    at = unpruned_of(ranking).nonzero().view(-1)
    ordered, index = all_keys(ranking, dtype)[at].sort(stable=True)
    sums = weight[at[index]].double().square().cumsum(0)
    counts = [round(share * len(at)) for share in FRACTIONS]
    cuts = []
    for key, count in zip(ordered[[n - 1 for n in counts]].tolist(), counts, strict=True):
        ties = count - int(torch.searchsorted(ordered, key))
        cuts.append(Cut(key, ties, int((ordered == key).sum())))
    found, whole = energies(RequestContext(), DRIVER, ranking, weight, cuts, dtype)
    assert found == pytest.approx(sums[[n - 1 for n in counts]].tolist(), rel=1e-9, abs=0)
    assert found[-1] == whole


def test_divisions_and_energies_have_the_same_bits_without_numba(large: list[Ranking]) -> None:
    assert kernels.enabled
    dtype = score_dtype(large)
    candidates = tuple(int(unpruned_of(ranking).sum()) for ranking in large)
    targets = [share * (candidates[0] + 3 * candidates[1]) for share in FRACTIONS]
    queries = [Query((1, 0), (9, 100), candidates[::-1], t, (3, 1)) for t in targets]
    expected = search(RequestContext(), DRIVER, large, queries, dtype)
    cuts = [Cut(d.key, d.counts[1] - d.below[1], d.equal[1]) for d in expected]
    weight = torch.randn(large[0].units, generator=torch.Generator().manual_seed(1))
    of_cuts = energies(RequestContext(), DRIVER, large[0], weight, cuts, dtype)
    reference = Local(TorchBackend(CPU))
    assert search(RequestContext(), reference, large, queries, dtype) == expected
    assert energies(RequestContext(), reference, large[0], weight, cuts, dtype) == of_cuts


def test_cancellation_ends_a_division(large: list[Ranking]) -> None:
    call = RequestContext()
    call.cancel()
    with pytest.raises(Cancelled):
        search(
            call,
            DRIVER,
            large[:1],
            [Query((0,), (0,), (large[0].units,), 9)],
            score_dtype(large[:1]),
        )


@given(drawn_rankings(), st.data())
@many
def test_lamp_of_a_batch_of_small_tensors_is_that_of_each(
    rankings: list[Ranking], data: st.DataObject
) -> None:
    rankings = [r for r in rankings if r.units and not r.is_random]
    assume(rankings)
    queries = []
    for _ in range(data.draw(st.integers(1, 3))):
        bounds = [
            data.draw(st.tuples(*[st.integers(0, int(unpruned_of(r).sum()))] * 2)) for r in rankings
        ]
        lowest, highest = zip(*map(sorted, bounds), strict=True)
        target = data.draw(st.integers(0, sum(highest)))
        queries.append(Query(tuple(range(len(rankings))), lowest, highest, target))
    at_once = search_by_lamp(RequestContext(), DRIVER, rankings, queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_keys, "MOST_UNITS", 0)
        assert search_by_lamp(RequestContext(), DRIVER, rankings, queries) == at_once
