"""Schedules: the share of the final amount that is pruned at a time.

Each schedule is a pure function of t in [0, 1], the part of the steps that are done, and of the
final sparsity in [0, 1]. It returns a share in [0, 1], which is 1 at t = 1.
"""

import math
from collections.abc import Callable

Share = Callable[[float, float], float]


def one_shot(t: float, final: float) -> float:
    """Prunes all at the first step."""
    return 1.0 if t > 0 else 0.0


def linear(t: float, final: float) -> float:
    """Prunes as much at each step."""
    return t


def cubic(t: float, final: float) -> float:
    """Prunes much at first, then less and less: 1 - (1 - t)^3.

    Zhu & Gupta 2017, "To prune, or not to prune", with an initial sparsity of 0.
    """
    return 1.0 - (1.0 - t) ** 3


def exponential(t: float, final: float) -> float:
    """Prunes at each step the same fraction of the unpruned units: (1 - (1 - final)^t) / final.

    torch.nn.utils.prune does that, called with one amount at each step. With `final` 1 that is all
    at the first step, and with 0, in the limit, t.
    """
    if final >= 1.0:
        return one_shot(t, final)
    if final <= 0.0 or t == 1.0:  # the formula gives 1 - 2^-53 for some
        return t
    return min(1.0, -math.expm1(t * math.log1p(-final)) / final)


SCHEDULES: dict[str, Share] = {
    schedule.__name__: schedule for schedule in (one_shot, linear, cubic, exponential)
}
