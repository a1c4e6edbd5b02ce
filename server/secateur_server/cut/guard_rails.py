"""Guard rails: how many units of a tensor may be pruned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from secateur_server.cut.scored import RankedTensor
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rail, Selection

# Names that an error shows: people do not read more.
SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """How many units of a tensor, or group, a rule may prune, and the rail that sets the most."""

    lowest: int
    highest: int
    highest_by: str = "max_sparsity"


def limits_of(
    context: RequestContext, rule: Selection, tensors: Sequence[RankedTensor]
) -> list[Limits]:
    """Computes the limits of each tensor.

    Raises:
        AmountOutOfRange: Rails contradict one another.
    """
    rails = rule.guard_rails.by_tensor
    return [_limits(rails.get(tensor.name), tensor) for tensor in context.each(tensors)]


def _limits(rail: Rail | None, tensor: RankedTensor) -> Limits:
    if rail is None:
        return Limits(0, tensor.candidates)
    units = tensor.ranking.units
    pruned = units - tensor.candidates
    # As decimals: 0.29 is 29 hundredths, and not the double that is a little less.
    least = math.ceil(Fraction(repr(rail.min_sparsity)) * units)
    most = math.floor(Fraction(repr(rail.max_sparsity)) * units)
    least = min(least, most) if rail.min_sparsity == rail.max_sparsity else least
    by_count = units - min(rail.keep_at_least, units)
    if least > by_count:
        raise AmountOutOfRange(
            f"{rail.path}.keep_at_least",
            f"{rail.keep_at_least} of the {units} units of {quote(tensor.name)} must be kept, but "
            f"min_sparsity {rail.min_sparsity} prunes {least}, {least - by_count} too many",
        )
    if least > most:
        raise AmountOutOfRange(
            f"{rail.path}.min_sparsity",
            f"{quote(tensor.name)} has {units} units, and no whole number of them is between "
            f"min_sparsity {rail.min_sparsity} and max_sparsity {rail.max_sparsity}",
        )
    highest = min(most, by_count)
    by = "keep_at_least" if by_count < most else "max_sparsity"
    return Limits(max(0, least - pruned), max(0, min(highest, units) - pruned), by)


def check_total(
    field: str,
    what: str,
    total: float,
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    costs: Sequence[float],
) -> None:
    """Refuses a total that the limits forbid.

    Args:
        field: The path of the amount.
        what: The name of what is counted.
        total: To prune, in what is counted.
        tensors: Whose units are compared.
        limits: Of each tensor.
        costs: Of a unit of each tensor, in what is counted.

    Raises:
        AmountOutOfRange: The limits allow less, or demand more.
    """
    least = sum(c * limit.lowest for c, limit in zip(costs, limits, strict=True))
    most = sum(c * limit.highest for c, limit in zip(costs, limits, strict=True))
    if total > most:
        binding = [
            f"{quote(s.name)} {limit.highest} of {s.candidates} ({limit.highest_by})"
            for s, limit in zip(tensors, limits, strict=True)
            if limit.highest < s.candidates
        ]
        raise AmountOutOfRange(
            field,
            f"cannot prune {_number(total)} {what}: guard rails allow {_number(most)} at most, "
            f"{_number(total - most)} too few: {_listed(binding)}; prune less",
        )
    if total < least:
        binding = [
            f"{quote(s.name)} {limit.lowest} of {s.candidates} (min_sparsity)"
            for s, limit in zip(tensors, limits, strict=True)
            if limit.lowest
        ]
        raise AmountOutOfRange(
            field,
            f"cannot prune only {_number(total)} {what}: guard rails prune {_number(least)} at "
            f"least, {_number(least - total)} too many: {_listed(binding)}; prune more",
        )


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
