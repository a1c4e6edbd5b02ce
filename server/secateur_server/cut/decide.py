"""Decides how many units are pruned of each tensor, where units of several tensors are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from secateur_server.cut.align import align
from secateur_server.cut.allocation import ALLOCATIONS
from secateur_server.cut.decision import Decision, changed_by, unit_costs
from secateur_server.cut.guard_rails import Limits, check_total, limits_of
from secateur_server.cut.observe import observe_score
from secateur_server.cut.scored import RankedTensor
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.rules import Selection


def decide(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
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
    if amounts[0].counts is not None:
        return [_decided(amount.counts or {}, tensors) for amount in context.each(amounts)]
    limits = limits_of(context, rule, tensors)
    if (threshold := amounts[0].threshold) is not None:
        decision = _decide_by_threshold(context, tensors, limits, threshold)
        return [align(rule, tensors, limits, decision)]
    asked = with_amounts(rule, amounts, at)
    counts = [amount_to_prune(one, tensors) for one in context.each(asked)]
    costs = unit_costs(rule, tensors)
    for one, count in zip(context.each(asked), counts, strict=True):
        check_total(
            f"{one.path}.{one.amount.field}", one.amount.counted, count, tensors, limits, costs
        )
    decisions = ALLOCATIONS[rule.allocation](context, rule, tensors, limits, counts)
    return [
        align(one, tensors, limits, decision)
        for one, decision in zip(context.each(asked), decisions, strict=True)
    ]


def _decided(counts: Mapping[str, int], tensors: Sequence[RankedTensor]) -> Decision:
    found = tuple(counts[tensor.name] for tensor in tensors)
    return Decision(found, sum(found))


def with_amounts(rule: Selection, amounts: Sequence[Amount], at: str) -> list[Selection]:
    """Makes a copy of the rule for each amount, with the path that errors name."""
    return [
        replace(rule, amount=amount, path=f"{at}[{index}]" if at else rule.path)
        for index, amount in enumerate(amounts)
    ]


def is_plain(rule: Selection) -> bool:
    """Whether a number of units is pruned by score alone, whatever tensors they are of."""
    amount, has_bounds = rule.amount, bool(rule.guard_rails.rails) or rule.align != 1
    is_number = amount.is_share or amount.is_per_tensor
    return is_number and rule.allocation == "rank" and not has_bounds


def amount_to_prune(rule: Selection, tensors: Sequence[RankedTensor]) -> float:
    """How much to prune of all tensors: units, or what they cost; rounded as torch does.

    Raises:
        AmountOutOfRange: The tensors have fewer units.
    """
    if (budget := rule.amount.budget) is not None:
        costs = unit_costs(rule, tensors)
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


def _decide_by_threshold(
    context: RequestContext,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    threshold: float,
) -> Decision:
    """Prunes all units below the threshold, within the limits."""
    rankings = [tensor.ranking for tensor in tensors]
    driver = rankings[0].driver(context)
    counts_at = observe_score(context, driver, rankings, threshold - rankings[0].offset)
    below = [count for count, _ in counts_at]
    counts = [
        min(max(found, limit.lowest), limit.highest)
        for found, limit in zip(below, limits, strict=True)
    ]
    bounds = changed_by(tensors, limits, counts, below, below)
    return Decision(tuple(counts), sum(below), bounds)
