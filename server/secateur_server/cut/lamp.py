"""Divisions by layer-adaptive magnitude: Lee et al. 2021, Layer-adaptive Sparsity.

A LAMP score is s_u^2 / the sum of s_v^2 over all v of the tensor that rank no lower; of equal
scores each counts as lower than the next. It rises with s, so only how many units go of each tensor
is asked for. Sums over buckets of scores bound the cut; what lies between the bounds is sorted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends import passes_of, spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.looks import SPACING, sample_places
from secateur_server.backends.passes import PART, Passes, Piece
from secateur_server.cut.divide import Division, Query, divide
from secateur_server.cut.divide_small import are_small
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import FEW, piece_of, score_dtype
from secateur_server.runtime.context import RequestContext

# Of a large tensor. More take longer to look up, and fewer leave more to sort.
BUCKETS = 256

# Sums are rounded, in whatever order they are made: bounds are a little wider.
SLACK = 1e-9


@dataclass(frozen=True)
class Buckets:
    """The units of a ranking, by their scores.

    cuts: keys, ascending; bucket j has the keys from cut j - 1 on and below cut j.
    up_to: int64, how many units are in the first j buckets.
    above: the sum of squares of all from bucket j on.
    least, most: bounds of the LAMP scores of each bucket, ascending.
    """

    pieces: Sequence[Piece]
    cuts: Tensor
    up_to: Tensor
    above: Tensor
    least: Tensor
    most: Tensor


@dataclass(frozen=True)
class Window:
    """The units of a ranking that may be at the cut, and how many surely go before them."""

    before: int
    ranking: Ranking


def divide_by_lamp(
    context: RequestContext, rankings: Sequence[Ranking], queries: Sequence[Query]
) -> list[Division]:
    """As divide, by LAMP scores, in float64; no query has costs."""
    if all(ranking.units <= FEW for ranking in rankings) and are_small(rankings):
        return divide(context, _scored(context, rankings), queries, torch.float64)
    buckets = [_buckets(context, ranking) for ranking in context.each(rankings)]
    return [_divide(context, rankings, buckets, query) for query in context.each(queries)]


def _divide(
    context: RequestContext, rankings: Sequence[Ranking], buckets: Sequence[Buckets], query: Query
) -> Division:
    # Each unit may be as low as its bucket's least, or as high as its most: so may the cut.
    low = _cut(context, query, [(of.least, of.up_to) for of in buckets])
    high = _cut(context, query, [(of.most, of.up_to) for of in buckets])
    members = zip(context.each(rankings), buckets, strict=True)
    windows = [_window(context, ranking, of, low, high) for ranking, of in members]
    inner = [
        _within(window, least, most)
        for window, least, most in zip(windows, query.lowest, query.highest, strict=True)
    ]
    sure, lowest, highest = zip(*inner, strict=True)
    within = Query(query.members, lowest, highest, query.target - sum(sure))
    (found,) = divide(context, [window.ranking for window in windows], [within], torch.float64)
    return Division(
        tuple(a + b for a, b in zip(sure, found.counts, strict=True)),
        found.key,
        tuple(w.before + below for w, below in zip(windows, found.below, strict=True)),
        found.equal,
    )


def _within(window: Window, least: int, most: int) -> tuple[int, int, int]:
    """How many go for sure, and how many of the window at least and at most, within bounds."""
    before, units = window.before, window.ranking.units
    if most <= before:
        return most, 0, 0
    if least >= before + units:
        return least, 0, 0
    return before, max(0, least - before), min(units, most - before)


def _cut(context: RequestContext, query: Query, scores: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The score by which the target is reached.

    scores: for each member those of its buckets, ascending, and how many units are up to each.
    """
    every = sorted({score for of, _ in scores for score in of.tolist()})

    def is_enough(cut: float) -> bool:
        up_to = [int(n[torch.searchsorted(of, cut, right=True)]) for of, n in context.each(scores)]
        bounds = zip(up_to, query.lowest, query.highest, strict=True)
        return sum(min(max(n, least), most) for n, least, most in bounds) >= query.target

    cut: float = every[min(bisect_left(every, True, key=is_enough), len(every) - 1)]
    return cut


def _window(
    context: RequestContext, ranking: Ranking, buckets: Buckets, low: float, high: float
) -> Window:
    """The units of the buckets whose scores may lie in [low, high], by their LAMP scores."""
    first = int(torch.searchsorted(buckets.most, low))
    end = int(torch.searchsorted(buckets.least, high, right=True))
    before, units = int(buckets.up_to[first]), 0
    falling = torch.empty(0, dtype=torch.float64)
    if end > first:
        units = int(buckets.up_to[end]) - before
        falling = _falling(context, ranking, buckets, first, end)
    scores, device = lamp_scores(falling, buckets.above[end]), ranking.device
    return Window(before, Ranking(ranking.name, units, scores.to(device), None, device))


def lamp_scores(falling: Tensor, above: Tensor | float) -> Tensor:
    """The LAMP scores of units along the last dimension.

    falling: scores, the largest first, written to.  above: the sum of squares of those before them.
    """
    squares = falling.square_()
    scores = squares / (squares.cumsum(-1) + above)
    scores[squares == 0] = 0.0  # of 0
    scores[squares.isinf()] = torch.inf  # of infinity
    # Rounding is not to turn two around.
    return scores.cummin(-1).values if scores.numel() else scores


def _scored(context: RequestContext, rankings: Sequence[Ranking]) -> list[Ranking]:
    """Small rankings by the LAMP scores of their alive units; those of one length at once."""
    living = [_living(ranking) for ranking in context.each(rankings)]
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, scores in enumerate(living):
        alike.setdefault((len(scores), scores.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for indices in context.each(alike.values()):
        stacked = torch.stack([living[index] for index in indices]).cpu()
        falling = stacked.to(torch.float64).abs().sort(1, descending=True).values
        found.update(zip(indices, lamp_scores(falling, 0.0), strict=True))
    return [
        Ranking(r.name, len(found[i]), found[i].to(r.device), None, r.device)
        for i, r in enumerate(rankings)
    ]


def _living(ranking: Ranking) -> Tensor:
    assert isinstance(ranking.scores, Tensor), "random scores have no LAMP"
    scores = ranking.scores.to(score_dtype([ranking]))
    return (
        scores if ranking.candidates is None else scores[ranking.candidates.flags(0, ranking.units)]
    )


def _falling(
    context: RequestContext, ranking: Ranking, buckets: Buckets, first: int, end: int
) -> Tensor:
    """The scores in the buckets [first, end), the largest first.  Returns: float64, on the CPU.

    There, as a GPU adds sums that run on in an order of its own.
    """
    passes, of_score = passes_of(ranking.device), score_dtype([ranking])
    beyond = torch.iinfo(BITS[of_score]).max  # the key of what is pruned already
    low = int(buckets.cuts[first - 1]) if first else 0
    high = int(buckets.cuts[end - 1]) if end <= len(buckets.cuts) else beyond

    def within(piece: Piece) -> Tensor:
        kept = torch.empty((piece.units + 7) // 8, dtype=torch.uint8, device=passes.device)
        return passes.split(piece, low, high, kept)[0]  # what lies above is of no interest

    keys = torch.cat(passes.map(context, within, buckets.pieces))
    return passes.ascending(keys).cpu().view(of_score).flip(0).to(torch.float64)


def _buckets(context: RequestContext, ranking: Ranking) -> Buckets:
    passes, dtype = passes_of(ranking.device), score_dtype([ranking])
    assert isinstance(ranking.scores, Tensor), "random scores have no LAMP"
    scores = ranking.scores
    parts = spans(ranking.units, PART)
    pieces = [piece_of(ranking, dtype, *span) for span in parts]
    cuts = _sampled_cuts(context, passes, pieces, ranking.units)

    def sums_of(part: tuple[Piece, tuple[int, int]]) -> tuple[Tensor, Tensor]:
        piece, span = part
        return passes.sum_squares(piece, scores[slice(*span)], cuts)

    found = passes.map(context, sums_of, list(zip(pieces, parts, strict=True)))
    # A cut's own units are in the bucket behind it.
    sums, counts = (sum(of[1:], start=of[0]) for of in zip(*found, strict=True))
    energy, units = (torch.cat([of[:1], of[1::2] + of[2::2]]) for of in (sums, counts))
    up_to = torch.cat([torch.zeros(1, dtype=torch.int64), units.cumsum(0)])
    above = torch.cat([energy.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    edges = cuts.cpu().view(dtype).to(torch.float64).square()
    return Buckets(pieces, cuts, up_to, above, *_bounds(edges, above))


def _bounds(edges: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most that LAMP scores in a bucket can be.  edges: squares at the cuts."""
    least = torch.cat([torch.zeros(1, dtype=torch.float64), edges]) / above[:-1]
    most = torch.cat([edges / (above[1:-1] + edges), torch.full((1,), torch.inf)])
    least = least.nan_to_num(0.0, posinf=torch.inf) * (1 - SLACK)
    most = most.nan_to_num(torch.inf, posinf=torch.inf) * (1 + SLACK)
    return least.cummax(0).values, most.flip(0).cummin(0).values.flip(0)


def _sampled_cuts(
    context: RequestContext, passes: Passes, pieces: Sequence[Piece], units: int
) -> Tensor:
    """Keys that cut a large tensor in buckets of about as many units each; none, of a small one."""
    if units <= FEW:
        return torch.empty(0, dtype=BITS[pieces[0].dtype], device=passes.device)
    index = sample_places(PART, min(SPACING, max(1, units // FEW)), passes.device)
    keys = torch.cat(passes.map(context, lambda piece: passes.sample(piece, index), list(pieces)))
    some = passes.ascending(keys)[:: max(1, len(keys) // BUCKETS)].tolist()
    return torch.tensor(sorted(set(some)), dtype=keys.dtype, device=passes.device)
