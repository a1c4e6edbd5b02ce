"""Divides a total among tensors by shares: uniform, or ERK."""

import math
from collections.abc import Sequence

from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import ScoredTensor
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def divide_by_shares(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    count: int,
) -> tuple[list[int], list[float]]:
    """Divides `count` pruned units among tensors, so that kept units are in proportion to shares.

    With uniform allocation, the share of a tensor is the number of its units. With ERK, it is that
    number times the sum of the tensor's dimensions over their product (Evci et al. 2020, Rigging
    the Lottery). A tensor that would keep more than all its units is dense, and the others share
    the rest.

    Args:
        context: The request.
        rule: The selection.
        tensors: The tensors whose units are compared.
        limits: How many units of each may be pruned.
        count: Units to prune in all.

    Returns:
        The units to prune of each tensor; and how many they would be without guard rails, not
        rounded.
    """
    candidates = [tensor.candidates for tensor in tensors]
    sizes = [s.ranking.units if rule.of_all else s.candidates for s in tensors]
    shares = [float(size) for size in sizes]
    if rule.allocation == "erk":
        shares = [s.sparse_share * s.ranking.units for s in tensors]
    kept = sum(candidates) - count
    lows = [a - limit.highest for a, limit in zip(candidates, limits, strict=True)]
    highs = [a - limit.lowest for a, limit in zip(candidates, limits, strict=True)]
    rounded = _round_within(context, _fill(context, shares, lows, highs, kept), lows, highs, kept)
    free = _fill(context, shares, [0] * len(candidates), candidates, kept)
    return (
        [a - s for a, s in zip(candidates, rounded, strict=True)],
        [a - f for a, f in zip(candidates, free, strict=True)],
    )


def _fill(
    context: RequestContext,
    shares: Sequence[float],
    lows: Sequence[int],
    highs: Sequence[int],
    total: int,
) -> list[float]:
    """Numbers with the sum `total`, in proportion to shares as far as lows and highs allow.

    Each round fixes the numbers that are outside their bounds, on the side that is off by more:
    the others can only move the other way (Bitran and Hax 1981).
    """
    found = [0.0] * len(shares)
    free = list(range(len(shares)))
    left = float(total)
    while free:
        context.check()
        free_shares = sum(shares[i] for i in free)
        scale = left / free_shares if free_shares else 0.0
        above = [i for i in free if shares[i] * scale > highs[i]]
        below = [i for i in free if shares[i] * scale < lows[i]]
        excess = sum(shares[i] * scale - highs[i] for i in above)
        lack = sum(lows[i] - shares[i] * scale for i in below)
        fixed, bounds = (above, highs) if excess >= lack and above else (below, lows)
        if not fixed:
            for i in free:
                found[i] = shares[i] * scale
            break
        for i in fixed:
            found[i] = float(bounds[i])
            left -= bounds[i]
        free = sorted(set(free) - set(fixed))
    return found


def _round_within(
    context: RequestContext,
    values: Sequence[float],
    lows: Sequence[int],
    highs: Sequence[int],
    total: int,
) -> list[int]:
    """Integers with the sum `total`, within bounds. The largest remainders are rounded up."""
    whole = [
        min(max(math.floor(v), low), high) for v, low, high in zip(values, lows, highs, strict=True)
    ]
    order = sorted(range(len(values)), key=lambda i: (whole[i] - values[i], i))
    while (missing := total - sum(whole)) != 0:
        context.check()
        step = 1 if missing > 0 else -1
        movable = [i for i in order if lows[i] <= whole[i] + step <= highs[i]]
        for i in movable[: abs(missing)] if step > 0 else movable[::-1][: abs(missing)]:
            whole[i] += step
    return whole
