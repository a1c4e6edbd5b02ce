"""Guard rails: between what numbers of units a tensor may lose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from secateur_server.cut.scored import ScoredTensor
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rail, Selection

# Of errors: more names than this are not read.
SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """How many units a tensor, or a group, may lose by a rule, and by which rail no more."""

    lowest: int
    highest: int
    highest_by: str = "max_sparsity"


def limits_of(
    context: RequestContext, rule: Selection, tensors: Sequence[ScoredTensor]
) -> list[Limits]:
    """The limits of each.  Errors: AmountOutOfRange, of rails that contradict one another."""
    rails = rule.guard_rails.by_tensor
    return [_limits(rails.get(tensor.name), tensor) for tensor in context.each(tensors)]


def _limits(rail: Rail | None, tensor: ScoredTensor) -> Limits:
    if rail is None:
        return Limits(0, tensor.candidates)
    units = tensor.ranking.units
    gone = units - tensor.candidates
    # 0.29 means 29 hundredths, and not the double that is a little less.
    least = math.ceil(Fraction(repr(rail.min_sparsity)) * units)
    most = math.floor(Fraction(repr(rail.max_sparsity)) * units)
    least = min(least, most) if rail.min_sparsity == rail.max_sparsity else least
    by_count = units - min(rail.keep_at_least, units)
    if least > by_count:
        raise AmountOutOfRange(
            f"{rail.path}.keep_at_least",
            f"{rail.keep_at_least} of the {units} units of {quote(tensor.name)} are to be kept, "
            f"and {least} pruned by min_sparsity {rail.min_sparsity}: {least - by_count} too many",
        )
    if least > most:
        raise AmountOutOfRange(
            f"{rail.path}.min_sparsity",
            f"no number of the {units} units of {quote(tensor.name)} lies between "
            f"{rail.min_sparsity} and {rail.max_sparsity}",
        )
    highest = min(most, by_count)
    by = "keep_at_least" if by_count < most else "max_sparsity"
    return Limits(max(0, least - gone), max(0, min(highest, units) - gone), by)


def check_total(
    field: str,
    what: str,
    total: float,
    tensors: Sequence[ScoredTensor],
    limits: Sequence[Limits],
    costs: Sequence[float],
) -> None:
    """Refuses a total that the limits forbid.

    total, costs: in what is counted, which is called `what`.  Errors: AmountOutOfRange.
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
            f"{_number(total)} {what} are to go, and the guard rails let go {_number(most)} at "
            f"most, {_number(total - most)} too few: {_listed(binding)}",
        )
    if total < least:
        binding = [
            f"{quote(s.name)} {limit.lowest} of {s.candidates} (min_sparsity)"
            for s, limit in zip(tensors, limits, strict=True)
            if limit.lowest
        ]
        raise AmountOutOfRange(
            field,
            f"{_number(total)} {what} are to go, and the guard rails make go {_number(least)} at "
            f"least, {_number(least - total)} too many: {_listed(binding)}",
        )


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
