"""Layer-adaptive magnitude, LAMP: Lee et al. 2021, Layer-adaptive Sparsity.

The LAMP score of a unit is s_u^2 / the sum of s_v^2 over all units v of the tensor that score no
lower. Of equal scores, each counts as lower than the next. LAMP scores rise with s, so it is enough
to find how many units of each tensor are pruned. Sums over buckets of scores bound the threshold,
and the units between the bounds are sorted.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends.pieces import Stored
from secateur_server.cut.allocation.lamp_windows import (
    Buckets,
    Window,
    lamp_scores,
    make_buckets,
    make_windows,
)
from secateur_server.cut.allocation.rank import decide_by_score, queries_of
from secateur_server.cut.decision import Decision
from secateur_server.cut.drivers import Driver
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.score import Ranked, Ranking, in_this_process
from secateur_server.cut.scored import RankedTensor
from secateur_server.cut.search import Division, Query, search
from secateur_server.cut.sorted_keys import FEW, is_sorting_faster
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def decide_by_lamp(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Decides as Allocation says, by LAMP scores."""
    rankings = [tensor.ranking for tensor in tensors]
    find = partial(search_by_lamp, context, rankings[0].driver(context), rankings)
    queries = queries_of(limits, targets)
    decisions = decide_by_score(context, tensors, limits, queries, find, torch.float64)
    # The cuts are not known in the tensors' own scores.
    return [replace(decision, cuts=()) for decision in decisions]


def search_by_lamp(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranked],
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
    here = in_this_process(rankings)
    if here and all(ranking.units <= FEW for ranking in here) and is_sorting_faster(here):
        return search(context, driver, _scored(context, here), queries, torch.float64)
    buckets = make_buckets(context, driver, rankings)
    return [_search(context, driver, rankings, buckets, query) for query in context.each(queries)]


def _search(
    context: RequestContext,
    driver: Driver,
    rankings: Sequence[Ranked],
    buckets: Sequence[Buckets],
    query: Query,
) -> Division:
    # The threshold is lowest if each unit has its bucket's least score, and highest with the most.
    low = _threshold(context, query, [(of.least, of.up_to) for of in buckets])
    high = _threshold(context, query, [(of.most, of.up_to) for of in buckets])
    windows = make_windows(context, driver, rankings, buckets, low, high)
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
