"""How many units are pruned of each tensor, where units of several tensors are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from secateur_server.backends.keys import BITS, score_at
from secateur_server.backends.pieces import Cut
from secateur_server.cut.allocate import divide_by_shares
from secateur_server.cut.choice import Bound
from secateur_server.cut.divide import Division, Query, count_below, divide
from secateur_server.cut.guard_rails import Limits, check_total, limits_of
from secateur_server.cut.lamp import divide_by_lamp
from secateur_server.cut.scored import ScoredTensor
from secateur_server.cut.select import score_dtype
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.rules import Selection


@dataclass(frozen=True)
class Decision:
    """How many units are pruned.

    Attributes:
        counts: Of each tensor.
        requested: In all, before guard rails.
        bounds: The guard rails that changed a count.
        threshold: The score at the common threshold; None if each tensor has its own.
        ties, ties_pruned: Units with that score, and how many of them are pruned.
        cuts: The cut of each tensor in the common dtype; None where it is not known yet.
    """

    counts: tuple[int, ...]
    requested: int
    bounds: tuple[Bound, ...] = ()
    threshold: float | None = None
    ties: int = 0
    ties_pruned: int = 0
    cuts: tuple[Cut | None, ...] = ()


def decide(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[ScoredTensor],
    amounts: Sequence[Amount],
    at: str = "",
) -> list[Decision]:
    """Decides for each amount how many units of each tensor are pruned.

    Args:
        context: The request.
        rule: Resolved.
        tensors: The tensors, or groups, whose units are compared.
        amounts: Each takes the place of the rule's amount.
        at: The path of `amounts` in the request, if they are not the rule's own.

    Returns:
        One decision for each amount.

    Raises:
        AmountOutOfRange: Guard rails forbid an amount, or there are fewer units.
    """
    limits = limits_of(context, rule, tensors)
    if (threshold := amounts[0].threshold) is not None:
        return [_decide_by_threshold(context, tensors, limits, threshold)]
    asked = [
        replace(rule, amount=amount, path=f"{at}[{index}]" if at else rule.path)
        for index, amount in enumerate(amounts)
    ]
    counts = [amount_to_prune(one, tensors) for one in context.each(asked)]
    costs = _costs(rule, tensors)
    for one, count in zip(context.each(asked), counts, strict=True):
        check_total(
            f"{one.path}.{one.amount.field}", one.amount.counted, count, tensors, limits, costs
        )
    if rule.allocation in ("uniform", "erk"):
        return [
            _decide_by_shares(context, rule, tensors, limits, int(count))
            for count in context.each(counts)
        ]
    return _decide_by_score(context, rule, tensors, limits, counts)


def is_plain(rule: Selection) -> bool:
    """Whether a number of units is pruned by score alone, whatever tensors they are of."""
    amount = rule.amount
    is_number = amount.is_share or amount.is_per_tensor
    return is_number and rule.allocation == "rank" and not rule.guard_rails.rails


def amount_to_prune(rule: Selection, tensors: Sequence[ScoredTensor]) -> float:
    """How much to prune of all tensors: units, or what they cost; rounded as torch does.

    Raises:
        AmountOutOfRange: The tensors have fewer units.
    """
    if (budget := rule.amount.budget) is not None:
        costs = _costs(rule, tensors)
        before = sum(cost * tensor.candidates for cost, tensor in zip(costs, tensors, strict=True))
        return max(0, before - budget)
    candidates = sum(tensor.candidates for tensor in tensors)
    units = sum(tensor.ranking.units for tensor in tensors)
    return units_to_prune(rule, [tensor.name for tensor in tensors], units, candidates)


def units_to_prune(rule: Selection, names: Sequence[str], units: int, candidates: int) -> int:
    """Returns how many units a fraction or a count of them is; rounded as torch does.

    Args:
        rule: Its amount is not a threshold or a budget.
        names: The tensors, or groups, that are compared; only one for a table.
        units: Of all tensors.
        candidates: Units that are still unpruned.

    Returns:
        Units to prune now.

    Raises:
        AmountOutOfRange: There are fewer units.
    """
    share = rule.amount.share(names[0])
    assert share is not None, "a threshold or a budget is not a number of units"
    base, pruned = (units, units - candidates) if rule.of_all else (candidates, 0)
    count = share.units(base)
    if count > base:
        where = quote(names[0]) if len(names) == 1 else f"{len(names)} tensors"
        kind = "units" if rule.of_all else "unpruned units"
        raise AmountOutOfRange(
            f"{rule.path}.count", f"{count} is more than the {base} {kind} of {where}; prune fewer"
        )
    return max(0, count - pruned)


def _costs(rule: Selection, tensors: Sequence[ScoredTensor]) -> list[float]:
    """The cost of a unit of each tensor."""
    return [rule.amount.unit_cost(tensor.name, tensor.unit_bytes) for tensor in tensors]


def _decide_by_score(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Prunes the lowest scores, whatever tensors they are of, within the limits."""
    is_lamp = rule.allocation == "lamp"
    rankings = [tensor.ranking for tensor in tensors]
    costs = None if rule.amount.budget is None else tuple(_costs(rule, tensors))
    members = tuple(range(len(tensors)))
    lowest = tuple(limit.lowest for limit in limits)
    highest = tuple(limit.highest for limit in limits)
    queries = [Query(members, lowest, highest, target, costs) for target in targets]
    dtype = torch.float64 if is_lamp else score_dtype(rankings)

    def divided(queries: Sequence[Query]) -> list[Division]:
        if is_lamp:
            return divide_by_lamp(context, rankings, queries)
        return divide(context, rankings, queries, dtype)

    divisions = divided(queries)
    passed = [_passed(division, limits) for division in context.each(divisions)]
    beyond = passed
    if any(lowest) and costs is None:  # the highest cut that prunes no more units
        more = [replace(query, target=query.target + 1) for query in queries]
        beyond = [
            [s.candidates for s in tensors]
            if query.target > sum(highest)
            else _passed(after, limits)
            for query, after in zip(context.each(more), divided(more), strict=True)
        ]
    return [
        _decision(tensors, limits, division, least, most, dtype, is_lamp)
        for division, least, most in zip(context.each(divisions), beyond, passed, strict=True)
    ]


def _passed(division: Division, limits: Sequence[Limits]) -> list[int]:
    """The units of each tensor up to the last unit that the division pruned for its score."""
    parts = list(zip(division.counts, division.below, division.equal, limits, strict=True))
    by_ties = [i for i, (c, b, _, of) in enumerate(parts) if c > min(max(b, of.lowest), of.highest)]
    last = max(by_ties, default=-1)
    return [c if i == last else b + e if i < last else b for i, (c, b, e, _) in enumerate(parts)]


def _decision(
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    division: Division,
    least: Sequence[int],
    most: Sequence[int],
    dtype: torch.dtype,
    is_lamp: bool,
) -> Decision:
    parts = list(zip(division.counts, division.below, division.equal, strict=True))
    cuts = [
        Cut(division.key, c - b, e) if division.key >= 0 and b <= c <= b + e else None
        for c, b, e in parts
    ]
    offset = 0.0 if is_lamp else tensors[0].ranking.offset
    value = None if division.key < 0 else score_at(division.key, dtype) + offset
    return Decision(
        division.counts,
        sum(division.counts),
        _bounds(tensors, limits, division.counts, least, most),
        value,
        sum(division.equal),
        sum(min(max(0, c - b), e) for c, b, e in parts),
        () if is_lamp else tuple(cuts),
    )


def _bounds(
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    counts: Sequence[int],
    least: Sequence[float],
    most: Sequence[float],
) -> tuple[Bound, ...]:
    """The limits that changed a count. `least` and `most` are the counts without limits."""
    found = []
    for tensor, limit, count, low, high in zip(tensors, limits, counts, least, most, strict=True):
        if count == limit.highest < high and limit.highest < tensor.candidates:
            found.append(Bound(tensor.name, limit.highest_by, count))
        elif count == limit.lowest > max(0, low):
            found.append(Bound(tensor.name, "min_sparsity", count))
    return tuple(found)


def _decide_by_shares(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    count: int,
) -> Decision:
    counts, free = divide_by_shares(context, rule, tensors, limits, count)
    # Rounding alone moves a count by less than 1 from its share.
    least, most = [share - 1 for share in free], [share + 1 for share in free]
    nearly = [math.floor(x) for x in least], [math.ceil(x) for x in most]
    return Decision(tuple(counts), count, _bounds(tensors, limits, counts, nearly[0], nearly[1]))


def _decide_by_threshold(
    context: RequestContext,
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    threshold: float,
) -> Decision:
    """Prunes all units below the threshold, within the limits."""
    rankings = [tensor.ranking for tensor in tensors]
    dtype = score_dtype(rankings)
    key = first_key(threshold - rankings[0].offset, dtype)
    below = [found for found, _ in count_below(context, rankings, key)]
    counts = [
        min(max(found, limit.lowest), limit.highest)
        for found, limit in zip(below, limits, strict=True)
    ]
    bounds = _bounds(tensors, limits, counts, below, below)
    return Decision(tuple(counts), sum(below), bounds)


def first_key(value: float, dtype: torch.dtype) -> int:
    """Returns the smallest key of a score that is not below `value`."""
    if value <= 0:
        return 0
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    key = int(nearest.view(BITS[dtype]))
    return key + 1 if float(nearest) < value else key
