"""Divides a total so that kept units are in proportion to shares: uniform, or ERK."""

import math
from collections.abc import Sequence

from secateur_server.cut.decision import Decision, changed_by
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import RankedTensor
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def decide_uniformly(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Decides as Allocation says. The share of a tensor is the number of its units."""
    sizes = [s.ranking.units if rule.of_all else s.candidates for s in tensors]
    return _decide(context, tensors, limits, targets, [float(size) for size in sizes])


def decide_by_erk(
    context: RequestContext,
    rule: Selection,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
) -> list[Decision]:
    """Decides as Allocation says, by ERK (Evci et al. 2020, Rigging the Lottery).

    The share of a tensor is the number of its units times the sum of its dimensions over their
    product.
    """
    shares = [s.sparse_share * s.ranking.units for s in tensors]
    return _decide(context, tensors, limits, targets, shares)


def _decide(
    context: RequestContext,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    targets: Sequence[float],
    shares: Sequence[float],
) -> list[Decision]:
    """A tensor that would keep more than all its units is dense, and the others share the rest."""
    candidates = [tensor.candidates for tensor in tensors]
    lows = [a - limit.highest for a, limit in zip(candidates, limits, strict=True)]
    highs = [a - limit.lowest for a, limit in zip(candidates, limits, strict=True)]
    decisions = []
    for target in context.each(targets):
        kept = sum(candidates) - int(target)
        filled = _fill(context, shares, lows, highs, kept)
        rounded = _round_within(context, filled, lows, highs, kept)
        counts = tuple(a - s for a, s in zip(candidates, rounded, strict=True))
        unlimited = _fill(context, shares, [0] * len(candidates), candidates, kept)
        free = [a - f for a, f in zip(candidates, unlimited, strict=True)]
        # Rounding alone moves a count by less than 1 from its share.
        least, most = [math.floor(x - 1) for x in free], [math.ceil(x + 1) for x in free]
        bounds = changed_by(tensors, limits, counts, least, most)
        decisions.append(Decision(counts, int(target), bounds))
    return decisions


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
