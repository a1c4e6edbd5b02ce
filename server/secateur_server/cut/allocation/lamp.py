"""Layer-adaptive magnitude, LAMP: Lee et al. 2021, Layer-adaptive Sparsity.

The LAMP score of a unit is s_u^2 / the sum of s_v^2 over all units v of the tensor that score no
lower. Of equal scores, each counts as lower than the next. LAMP scores rise with s, so it is enough
to find how many units of each tensor are pruned. Sums over buckets of scores bound the threshold,
and the units between the bounds are sorted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import PART, Piece, Stored
from secateur_server.backends.protocol import Backend
from secateur_server.backends.scan import SPACING
from secateur_server.cut.allocation.rank import decide_by_score, queries_of
from secateur_server.cut.decision import Decision
from secateur_server.cut.drivers import Driver
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.observe import observe_sample, observe_squares
from secateur_server.cut.score import Ranking, in_this_process
from secateur_server.cut.scored import RankedTensor
from secateur_server.cut.search import Division, Query, search
from secateur_server.cut.sorted_keys import FEW, is_sorting_faster
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection

# For a large tensor. More buckets take longer to search, and fewer leave more units to sort.
BUCKETS = 256

# Relative. Bounds are a little wider, as sums are rounded in an unknown order.
SLACK = 1e-9


@dataclass(frozen=True)
class Buckets:
    """The units of a ranking, by their scores.

    Attributes:
        cuts: Ascending keys. Bucket j has the keys from cut j - 1 on and below cut j.
        up_to: int64, how many units are in the first j buckets.
        above: The sum of squares of all units from bucket j on.
        least, most: Bounds of the LAMP scores of each bucket, ascending.
    """

    cuts: Tensor
    up_to: Tensor
    above: Tensor
    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class Window:
    """The units of a ranking that may be at the threshold. `before` units are surely below it."""

    before: int
    ranking: Ranking


def decide_by_lamp(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Decides as Allocation says, by LAMP scores."""
    rankings = in_this_process([tensor.ranking for tensor in tensors])
    assert rankings, "LAMP is not divided"
    find = partial(search_by_lamp, context, rankings[0].driver(context), rankings)
    queries = queries_of(limits, targets)
    decisions = decide_by_score(context, tensors, limits, queries, find, torch.float64)
    # The cuts are not known in the tensors' own scores.
    return [replace(decision, cuts=()) for decision in decisions]


def search_by_lamp(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranking],
    queries: Sequence[Query],
) -> list[Division]:
    """Does `search` by LAMP scores, in float64.

    Args:
        context: The request.
        driver: Of the tensors.
        rankings: The units of each tensor, by magnitude.
        queries: Without costs.

    Returns:
        One division for each query.
    """
    if all(ranking.units <= FEW for ranking in rankings) and is_sorting_faster(rankings):
        return search(context, driver, _scored(context, rankings), queries, torch.float64)
    buckets = [_buckets(context, driver, ranking) for ranking in context.each(rankings)]
    return [_search(context, driver, rankings, buckets, query) for query in context.each(queries)]


def _search(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranking],
    buckets: Sequence[Buckets],
    query: Query,
) -> Division:
    # The threshold is lowest if each unit has its bucket's least score, and highest with the most.
    low = _threshold(context, query, [(of.least, of.up_to) for of in buckets])
    high = _threshold(context, query, [(of.most, of.up_to) for of in buckets])
    members = zip(context.each(rankings), buckets, strict=True)
    windows = [_window(context, driver, ranking, of, low, high) for ranking, of in members]
    inner = [
        _within(window, least, most)
        for window, least, most in zip(windows, query.lowest, query.highest, strict=True)
    ]
    sure, lowest, highest = zip(*inner, strict=True)
    within = Query(query.members, lowest, highest, query.target - sum(sure))
    scored = [window.ranking for window in windows]
    (found,) = search(context, driver, scored, [within], torch.float64)
    return Division(
        tuple(a + b for a, b in zip(sure, found.counts, strict=True)),
        found.key,
        tuple(w.before + below for w, below in zip(windows, found.below, strict=True)),
        found.equal,
    )


def _within(window: Window, least: int, most: int) -> tuple[int, int, int]:
    """Units that are surely pruned, and the least and most of the window, within the bounds."""
    before, units = window.before, window.ranking.units
    if most <= before:
        return most, 0, 0
    if least >= before + units:
        return least, 0, 0
    return before, max(0, least - before), min(units, most - before)


def _threshold(
    context: RequestContext, query: Query, scores: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """The score by which the target is reached.

    Args:
        context: The request.
        query: The bounds and the target.
        scores: For each member the ascending scores of its buckets, and the units up to each.
    """
    every = sorted({score for of, _ in scores for score in of.tolist()})

    def is_enough(cut: float) -> bool:
        up_to = [int(n[torch.searchsorted(of, cut, right=True)]) for of, n in context.each(scores)]
        bounds = zip(up_to, query.lowest, query.highest, strict=True)
        return sum(min(max(n, least), most) for n, least, most in bounds) >= query.target

    cut: float = every[min(bisect_left(every, True, key=is_enough), len(every) - 1)]
    return cut


def _window(
    context: RequestContext,
    driver: Driver,
    ranking: Ranking,
    buckets: Buckets,
    low: float,
    high: float,
) -> Window:
    """The units of the buckets whose scores may be in [low, high], with their LAMP scores."""
    first = int(torch.searchsorted(buckets.most, low))
    end = int(torch.searchsorted(buckets.least, high, right=True))
    before, units = int(buckets.up_to[first]), 0
    falling = torch.empty(0, dtype=torch.float64)
    if end > first:
        units = int(buckets.up_to[end]) - before
        falling = _falling(context, driver, ranking, buckets, first, end)
    scores, device = lamp_scores(falling, buckets.above[end]), ranking.device
    return Window(before, Ranking(ranking.name, units, Stored(scores.to(device)), None, device))


def lamp_scores(falling: Tensor, above: Tensor | float) -> Tensor:
    """Computes LAMP scores along the last dimension.

    Args:
        falling: Scores, the largest first. Written to.
        above: The sum of squares of the units before them.

    Returns:
        The scores in the same order.
    """
    squares = falling.square_()
    scores = squares / (squares.cumsum(-1) + above)
    scores[squares == 0] = 0.0  # also where the sum is 0
    scores[squares.isinf()] = torch.inf
    # Rounding must not change the order of two scores.
    return scores.cummin(-1).values if scores.numel() else scores


def _scored(context: RequestContext, rankings: Sequence[Ranking]) -> list[Ranking]:
    """Small rankings by LAMP scores of their candidates; those of one length at once."""
    candidates = [_candidate_scores(ranking) for ranking in context.each(rankings)]
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, scores in enumerate(candidates):
        alike.setdefault((len(scores), scores.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for indices in context.each(alike.values()):
        stacked = torch.stack([candidates[index] for index in indices]).cpu()
        falling = stacked.to(torch.float64).abs().sort(1, descending=True).values
        found.update(zip(indices, lamp_scores(falling, 0.0), strict=True))
    return [
        Ranking(r.name, len(found[i]), Stored(found[i].to(r.device)), None, r.device)
        for i, r in enumerate(rankings)
    ]


def _candidate_scores(ranking: Ranking) -> Tensor:
    scores = ranking.values.to(ranking.dtype)
    return (
        scores if ranking.candidates is None else scores[ranking.candidates.flags(0, ranking.units)]
    )


def _falling(
    context: RequestContext,
    driver: Driver,
    ranking: Ranking,
    buckets: Buckets,
    first: int,
    end: int,
) -> Tensor:
    """The scores in the buckets [first, end), the largest first, as float64 on the CPU.

    On the CPU, as a GPU makes running sums in an order of its own.
    """
    dtype = ranking.dtype
    beyond = torch.iinfo(BITS[dtype]).max  # the key of units that are pruned already
    low = int(buckets.cuts[first - 1]) if first else 0
    high = int(buckets.cuts[end - 1]) if end <= len(buckets.cuts) else beyond
    pieces = ranking.pieces(dtype, PART)
    keys = torch.cat(driver.map(context, partial(_keys_between, low=low, high=high), pieces))
    return driver.backend.ascending(keys).cpu().view(dtype).flip(0).to(torch.float64)


def _keys_between(
    context: RequestContext, backend: Backend, piece: Piece, low: int, high: int
) -> Tensor:
    return backend.split([piece], low, high).keys


def _buckets(context: RequestContext, driver: Driver, ranking: Ranking) -> Buckets:
    cuts = _sampled_cuts(context, driver, ranking)
    parts = spans(ranking.units, PART)
    found = observe_squares(context, driver, ranking, ranking.dtype, ranking.values, cuts, parts)
    # Units with the key of a cut are in the bucket after it.
    sums, counts = (sum(of[1:], start=of[0]) for of in found)
    energy, units = (torch.cat([of[:1], of[1::2] + of[2::2]]) for of in (sums, counts))
    up_to = torch.cat([torch.zeros(1, dtype=torch.int64), units.cumsum(0)])
    above = torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    edges = cuts.cpu().view(ranking.dtype).to(torch.float64).square()
    return Buckets(cuts, up_to, above, *_bounds(edges, above))


def _bounds(edges: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the LAMP scores in each bucket. `edges` are squares at the cuts."""
    least = torch.cat([torch.zeros(1, dtype=torch.float64), edges]) / above[:-1]
    most = torch.cat([edges / (above[1:-1] + edges), torch.full((1,), torch.inf)])
    least = least.nan_to_num(0.0, posinf=torch.inf) * (1 - SLACK)
    most = most.nan_to_num(torch.inf, posinf=torch.inf) * (1 + SLACK)
    return least.cummax(0).values, most.flip(0).cummin(0).values.flip(0)


def _sampled_cuts(context: RequestContext, driver: Driver, ranking: Ranking) -> Tensor:
    """Keys that divide a large tensor into buckets of about equal size; none for a small one."""
    if ranking.units <= FEW:
        return torch.empty(0, dtype=BITS[ranking.dtype], device=ranking.device)
    spacing = min(SPACING, max(1, ranking.units // FEW))
    pieces = ranking.pieces(ranking.dtype, PART)
    keys = observe_sample(context, driver, pieces, PART, spacing)
    some = driver.backend.ascending(keys)[:: max(1, len(keys) // BUCKETS)].tolist()
    return torch.tensor(sorted(set(some)), dtype=keys.dtype, device=ranking.device)
