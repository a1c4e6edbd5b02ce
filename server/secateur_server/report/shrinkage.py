"""Measures the tensors of a shrunk model, and finds pruned slices that are still there."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.errors import quote
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import candidate_units
from secateur_server.report.listing import listed
from secateur_server.report.measure import Sparsity, measure
from secateur_server.report.tensors import MeasuredTensors, measure_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.slices import Shrinking, smaller_parameter

# Returns for each member of a group which of its units have unpruned elements: bool, (members,
# units).
FlagsOf = Callable[[Group], Tensor]


class Uncut(NamedTuple):
    """Slices of a tensor along a dimension that are wholly zero, and were not removed."""

    tensor: str
    dim: int
    slices: int
    reason: str


def measure_sent(
    context: RequestContext, parameters: Mapping[str, Parameter], shrinking: Shrinking | None
) -> MeasuredTensors:
    """Measures parameters without the slices that are removed from them.

    Args:
        context: The request.
        parameters: As they are before.
        shrinking: The kept slices; None if nothing is removed.

    Returns:
        The counts. Large parameters that lose slices have weights without data.
    """
    if shrinking is None:
        return measure_tensors(context, parameters)
    sent, large = dict(parameters), dict[str, Sparsity]()
    for name in context.each(parameters.keys() & shrinking.slices.keys()):
        smaller = smaller_parameter(context, name, parameters[name], shrinking)
        if not smaller.is_small:  # one at a time is in memory
            large[name] = measure(context, smaller)
            smaller = smaller._replace(weight=smaller.weight.to("meta"))
        sent[name] = smaller
    found = measure_tensors(context, {n: p for n, p in sent.items() if n not in large})
    return MeasuredTensors(sent, found.batches, {**found.others, **large})


def find_uncut(
    context: RequestContext,
    zero_slices: Mapping[str, Sequence[int]],
    groups: Sequence[Group],
    flags_of: FlagsOf,
) -> Iterator[Uncut]:
    """Yields the slices that are wholly zero in a shrunk model, with the reason.

    Args:
        context: The request.
        zero_slices: Of each tensor that was pruned, by dimension.
        groups: As distinct_groups returns them.
        flags_of: Returns for each member of a group which units have unpruned elements.
    """
    named: dict[tuple[str, int], list[tuple[Group, int]]] = defaultdict(list)
    for group in context.each(groups):
        for place, member in enumerate(group.members):
            named[member.tensor, member.dim].append((group, place))
    kept: dict[str, _KeptUnits] = {}
    for name, counts in context.each(zero_slices.items()):
        for dim, count in enumerate(counts):
            if count and (name, dim) in named:
                reason = _reason(named[name, dim], kept, flags_of)
                yield Uncut(name, dim, count, reason)
            elif count and dim < 2:
                yield Uncut(name, dim, count, "no group names slices along this dimension")


class _KeptUnits(NamedTuple):
    """Which units of a group have unpruned elements, by member, and why others are still there."""

    flags: Tensor
    reason: str


def member_flags(
    context: RequestContext, parameters: Mapping[str, Parameter], group: Group
) -> Tensor:
    """Finds which units have unpruned elements, for each member of a group.

    Args:
        context: The request.
        parameters: All, with their masks.
        group: Resolved.

    Returns:
        Bool, (members, units).
    """
    flags = torch.ones(len(group.members), group.units, dtype=torch.bool)
    for place, member in enumerate(context.each(group.members)):
        mask = candidate_units(context, Group(group.name, (member,)), parameters)
        if mask is not None:
            flags[place] = mask.flags(0, group.units).cpu()
    return flags


def _kept_units(group: Group, flags: Tensor) -> _KeptUnits:
    is_partial = flags.any(0) & ~flags.all(0)
    blocking = flags[:, is_partial].any(1).nonzero().view(-1).tolist()
    if not blocking:
        return _KeptUnits(flags, "a group keeps at least one unit")
    tensors = listed([group.members[place].tensor for place in blocking])
    verb = "has" if len(blocking) == 1 else "have"
    return _KeptUnits(flags, f"{tensors} {verb} unpruned elements in the same units")


def _reason(
    places: Sequence[tuple[Group, int]], kept: dict[str, _KeptUnits], flags_of: FlagsOf
) -> str:
    """Why slices of a tensor that are zero were not removed, by its members along a dimension."""
    for group, place in places:
        if group.name not in kept:
            kept[group.name] = _kept_units(group, flags_of(group))
        found = kept[group.name]
        if not bool(found.flags[place].all()):
            return f"group {quote(group.name)}: {found.reason}"
    return "they are zero, but no mask prunes them: PRIOR_ZEROS counts zeros as pruned"
