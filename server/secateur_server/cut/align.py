"""Rounds the numbers of units that groups keep to multiples, which are faster to compute."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from secateur_server.cut.decision import Decision, unit_costs
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import RankedTensor
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.granularity.group import Group
from secateur_server.spec.rules import Selection

# The multiple of slices that suits the kernels of most hardware.
SLICES = 16


class _Choice(NamedTuple):
    """The numbers of units that a group may keep: one, or a lower and a higher one."""

    low: int
    high: int


def align(
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    decision: Decision,
) -> Decision:
    """Rounds a decision as Selection.align in spec.proto says.

    Args:
        rule: Resolved.
        tensors: The groups whose units are compared.
        limits: Of each group.
        decision: How many units of each are pruned.

    Returns:
        The decision with other counts, and without a common threshold where they differ.

    Raises:
        AmountOutOfRange: Guard rails, or a target of operations, leave no multiple.
    """
    if rule.align == 1:
        return decision
    kept = [t.candidates - count for t, count in zip(tensors, decision.counts, strict=True)]
    choices = [
        _choice(rule, tensor, limit, count)
        for tensor, limit, count in zip(tensors, limits, kept, strict=True)
    ]
    aligned = _rounded(rule, tensors, kept, choices)
    if aligned == kept:
        return decision
    counts = tuple(t.candidates - count for t, count in zip(tensors, aligned, strict=True))
    return replace(decision, counts=counts, threshold=None, ties=0, ties_pruned=0, cuts=())


def _choice(rule: Selection, tensor: RankedTensor, limit: Limits, kept: int) -> _Choice:
    """The multiples below and above a number of kept units, as far as bounds allow them."""
    step = rule.align or _suitable(rule.groups_by_name[tensor.name])
    most, least = tensor.candidates - limit.lowest, tensor.candidates - limit.highest
    if kept in (0, tensor.candidates) or tensor.candidates < step or kept % step == 0:
        return _Choice(kept, kept)
    low = kept - kept % step
    allowed = [count for count in (low, low + step) if max(1, least) <= count <= most]
    if allowed:
        return _Choice(allowed[0], allowed[-1])
    if rule.align:
        raise AmountOutOfRange(
            f"{rule.path}.align",
            f"{quote(tensor.name)} may keep {least} to {most} of {tensor.candidates} units, and "
            f"neither {low} nor {low + step}; change the guard rails, or align={rule.align}",
        )
    return _Choice(kept, kept)


def _suitable(group: Group) -> int:
    """The default of a group."""
    most = min(SLICES, max(1, group.units // 4))
    slices = min(member.slices_of_unit for member in group.members)
    return max(1, (1 << most.bit_length() - 1) // math.gcd(SLICES, slices))


def _rounded(
    rule: Selection,
    tensors: Sequence[RankedTensor],
    kept: Sequence[int],
    choices: Sequence[_Choice],
) -> list[int]:
    """Takes the higher numbers of the groups that are nearest to them, as far as the total allows.

    The total comes as near as it can to what was decided; a budget is not exceeded.
    """
    budget = rule.amount.budget
    costs = [1.0] * len(tensors) if budget is None else unit_costs(rule, tensors)
    aligned = [choice.low for choice in choices]
    total = sum(cost * count for cost, count in zip(costs, aligned, strict=True))
    enough = sum(kept) if budget is None else budget
    if budget is not None and total > budget:
        if rule.align:
            raise AmountOutOfRange(
                f"{rule.path}.align",
                f"groups that keep a multiple of {rule.align} units need {total:g} "
                f"{rule.amount.counted}, above the target of {budget:g}; raise it, or lower align",
            )
        return list(kept)
    nearest = sorted(
        (index for index, choice in enumerate(choices) if choice.low < choice.high),
        key=lambda index: choices[index].high - kept[index],
    )
    for index in nearest:
        more = costs[index] * (choices[index].high - choices[index].low)
        least = more / 2 if budget is None else more
        if total + least > enough:
            continue
        aligned[index] = choices[index].high
        total += more
    return aligned
