"""Decisions: how many units are pruned of each tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur_server.backends.pieces import Cut
from secateur_server.cut.choice import Bound
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import RankedTensor
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


def unit_costs(rule: Selection, tensors: Sequence[RankedTensor]) -> list[float]:
    """The cost of a unit of each tensor."""
    return [rule.amount.unit_cost(tensor.name, tensor.unit_bytes) for tensor in tensors]


def changed_by(
    tensors: Sequence[RankedTensor],
    limits: Sequence[Limits],
    counts: Sequence[int],
    least: Sequence[float],
    most: Sequence[float],
) -> tuple[Bound, ...]:
    """Finds the limits that changed a count. `least` and `most` are the counts without limits."""
    found = []
    for tensor, limit, count, low, high in zip(tensors, limits, counts, least, most, strict=True):
        if count == limit.highest < high and limit.highest < tensor.candidates:
            found.append(Bound(tensor.name, limit.highest_by, count))
        elif count == limit.lowest > max(0, low):
            found.append(Bound(tensor.name, "min_sparsity", count))
    return tuple(found)
