"""Makes groups of the units that a trace found."""

from collections import defaultdict
from collections.abc import Collection, Iterator

import torch

from secateur.grouping import Group, Member, group, member
from secateur.traced.units import NO_UNIT, Units

_ONE = "all its slices make one unit"
_FIXED = "torch.nn.MultiheadAttention has a width for each of its heads: it cannot be smaller"
_NO_SCORES = "no weight of more than one dimension is in the unit"

# From a tensor and a dimension to slices: of one unit, or of each.
Slices = dict[tuple[str, int], list[int]]


def groups(
    units: Units, scored: Collection[str], masked: Collection[str], fixed: Collection[str]
) -> list[Group]:
    """Makes a group of all units that have as many slices in the same tensors.

    Args:
        units: What is one unit by itself is frozen.
        scored: Names of tensors that say how important a unit is.
        masked: Names of tensors whose slices are zero in the masked model.
        fixed: Names of tensors that cannot be cut.
    """
    kinds: dict[tuple[tuple[tuple[str, int], int], ...], dict[int, Slices]] = defaultdict(dict)
    for root, slices in _slices(units).items():
        kinds[tuple((key, len(found)) for key, found in slices.items())][root] = slices
    made: dict[str, Group] = {}
    for kind, found in kinds.items():
        if any(tensor in fixed for (tensor, _), _ in kind):
            units.freeze(torch.tensor(list(found)), _FIXED)
            continue
        name = _name(units, [key for key, _ in kind], scored)
        if name is None or len(found) == 1:
            units.freeze(torch.tensor(list(found)), _ONE if name else _NO_SCORES)
            continue
        while name in made:
            name += "+"
        made[name] = group(name, *_members(list(found.values()), scored, masked))
    return list(made.values())


def _slices(units: Units) -> dict[int, Slices]:
    """Returns the slices of each unit that may be cut."""
    found: dict[int, Slices] = defaultdict(dict)
    for named in units.named:
        for index, root in enumerate(units.units(named.labels).tolist()):
            if root != NO_UNIT:
                found[root].setdefault((named.tensor, named.dim), []).append(index)
    return found


def _name(units: Units, keys: list[tuple[str, int]], scored: Collection[str]) -> str | None:
    """Returns the first tensor that makes the units; None if they have no scores."""
    makers = [
        named.tensor
        for named in units.named
        if (named.tensor, named.dim) in keys and units.produced(named.labels).any()
    ]
    names = [name for name in (*makers, *(tensor for tensor, _ in keys)) if name in scored]
    return names[0] if names else None


def _members(
    units: list[Slices], scored: Collection[str], masked: Collection[str]
) -> Iterator[Member]:
    for tensor, dim in units[0]:
        indices = [index for slices in units for index in slices[tensor, dim]]
        stride = len(indices) // len(units)
        is_run = indices == list(range(indices[0], indices[0] + len(indices)))
        place = {"offset": indices[0], "stride": stride} if is_run else {"indices": indices}
        yield member(
            tensor,
            dim,
            units=len(units),
            scored=tensor in scored,
            masked=tensor in masked,
            **place,
        )


def whole(units: Units, weights: Collection[str]) -> dict[str, str]:
    """Returns the weights of which a layer's results stay whole, and why."""
    kept: dict[str, dict[str, None]] = defaultdict(dict)
    others: dict[str, str] = {}
    for named in units.named:
        labels = named.labels[units.units(named.labels) == NO_UNIT]
        for label in labels[labels != NO_UNIT][:1].tolist():
            others.setdefault(named.tensor, units.reason(label))
        for label in labels[units.produced(labels)][:1].tolist():
            kept[named.tensor][units.reason(label)] = None
    cut = {named.tensor for named in units.named if (units.units(named.labels) != NO_UNIT).any()}
    rest = {tensor: {reason: None} for tensor, reason in others.items() if tensor not in cut}
    return {name: "; ".join(why) for name, why in (rest | kept).items() if name in weights}
