"""Prunes the lowest scores, whatever tensors they are of."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from secateur_server.backends.keys import score_at
from secateur_server.backends.pieces import Cut
from secateur_server.cut.decision import Decision, changed_by, unit_costs
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.score import score_dtype
from secateur_server.cut.scored import RankedTensor
from secateur_server.cut.search import Division, Query, search
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def decide_by_rank(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Decides as Allocation says, by the scores themselves."""
    rankings = [tensor.ranking for tensor in tensors]
    driver, dtype = rankings[0].driver(context), score_dtype(rankings)
    costs = None if rule.amount.budget is None else tuple(unit_costs(rule, tensors))
    find = partial(search, context, driver, rankings, dtype=dtype)
    queries = queries_of(limits, targets, costs)
    return decide_by_score(context, tensors, limits, queries, find, dtype, rankings[0].offset)


def queries_of(
    limits: Sequence[Limits], targets: Sequence[float], costs: tuple[float, ...] | None = None
) -> list[Query]:
    """Makes a query among all tensors for each target."""
    members = tuple(range(len(limits)))
    lowest = tuple(limit.lowest for limit in limits)
    highest = tuple(limit.highest for limit in limits)
    return [Query(members, lowest, highest, target, costs) for target in targets]


def decide_by_score(
    context: RequestContext,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    queries: Sequence[Query],
    find: Callable[[Sequence[Query]], list[Division]],
    dtype: torch.dtype,
    offset: float = 0.0,
) -> list[Decision]:
    """Decides by the divisions of queries.

    Args:
        context: The request.
        tensors: The tensors, or groups, whose units are compared.
        limits: How many units of each may be pruned.
        queries: Among all tensors, within the limits.
        find: Returns the division of each query.
        dtype: Of the scores that `find` compares.
        offset: What was subtracted from them.

    Returns:
        One decision for each query.
    """
    divisions = find(queries)
    passed = [_passed(division, limits) for division in context.each(divisions)]
    beyond = passed
    if queries[0].costs is None and any(queries[0].lowest):
        # The highest cut that prunes no more units.
        more = [replace(query, target=query.target + 1) for query in queries]
        beyond = [
            [tensor.candidates for tensor in tensors]
            if query.target > sum(query.highest)
            else _passed(after, limits)
            for query, after in zip(context.each(more), find(more), strict=True)
        ]
    decisions = []
    for division, least, most in zip(context.each(divisions), beyond, passed, strict=True):
        bounds = changed_by(tensors, limits, division.counts, least, most)
        value = None if division.key < 0 else score_at(division.key, dtype) + offset
        parts = list(zip(division.counts, division.below, division.equal, strict=True))
        cuts = tuple(
            Cut(division.key, c - b, e) if division.key >= 0 and b <= c <= b + e else None
            for c, b, e in parts
        )
        ties = sum(min(max(0, c - b), e) for c, b, e in parts)
        requested, equal = sum(division.counts), sum(division.equal)
        decisions.append(Decision(division.counts, requested, bounds, value, equal, ties, cuts))
    return decisions


def _passed(division: Division, limits: Sequence[Limits]) -> list[int]:
    """The units of each tensor up to the last unit that the division pruned for its score."""
    parts = list(zip(division.counts, division.below, division.equal, limits, strict=True))
    by_ties = [i for i, (c, b, _, of) in enumerate(parts) if c > min(max(b, of.lowest), of.highest)]
    last = max(by_ties, default=-1)
    return [c if i == last else b + e if i < last else b for i, (c, b, e, _) in enumerate(parts)]
