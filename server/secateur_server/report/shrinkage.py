"""Measures the tensors of a shrunk model, and finds pruned slices that are still there."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    parameters: Mapping[str, Parameter],
) -> Iterator[Uncut]:
    """Yields the slices that are wholly zero in a shrunk model, with the reason.

    Args:
        context: The request.
        zero_slices: Of each tensor that was pruned, by dimension.
        groups: As distinct_groups returns them.
        parameters: All, as they were before.
    """
    named: dict[tuple[str, int], list[tuple[Group, int]]] = defaultdict(list)
    for group in context.each(groups):
        for place, member in enumerate(group.members):
            named[member.tensor, member.dim].append((group, place))
    kept: dict[str, _KeptUnits] = {}
    for name, counts in context.each(zero_slices.items()):
        for dim, count in enumerate(counts):
            if count and (name, dim) in named:
                reason = _reason(context, named[name, dim], kept, parameters)
                yield Uncut(name, dim, count, reason)
            elif count and dim < 2:
                yield Uncut(name, dim, count, "no group names slices along this dimension")


class _KeptUnits(NamedTuple):
    """Which units of a group have unpruned elements, by member, and why others are still there."""

    flags: Tensor
    reason: str


def _kept_units(
    context: RequestContext, group: Group, parameters: Mapping[str, Parameter]
) -> _KeptUnits:
    flags = torch.ones(len(group.members), group.units, dtype=torch.bool)
    for place, member in enumerate(context.each(group.members)):
        mask = candidate_units(context, Group(group.name, (member,)), parameters)
        if mask is not None:
            flags[place] = mask.flags(0, group.units).cpu()
    is_partial = flags.any(0) & ~flags.all(0)
    blocking = flags[:, is_partial].any(1).nonzero().view(-1).tolist()
    if not blocking:
        return _KeptUnits(flags, "a group keeps at least one unit")
    tensors = listed([group.members[place].tensor for place in blocking])
    verb = "has" if len(blocking) == 1 else "have"
    return _KeptUnits(flags, f"{tensors} {verb} unpruned elements in the same units")


def _reason(
    context: RequestContext,
    places: Sequence[tuple[Group, int]],
    kept: dict[str, _KeptUnits],
    parameters: Mapping[str, Parameter],
) -> str:
    """Why slices of a tensor that are zero were not removed, by its members along a dimension."""
    for group, place in places:
        if group.name not in kept:
            kept[group.name] = _kept_units(context, group, parameters)
        found = kept[group.name]
        if not bool(found.flags[place].all()):
            return f"group {quote(group.name)}: {found.reason}"
    return "they are zero, but no mask prunes them: PRIOR_ZEROS counts zeros as pruned"
