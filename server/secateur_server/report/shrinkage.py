"""Measures the tensors of a shrunk model, and finds pruned slices that are still there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur_server.errors import quote
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.groups import candidate_units
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


def measure_smaller(
    context: RequestContext, parameters: Mapping[str, Parameter], shrinking: Shrinking
) -> MeasuredTensors:
    """Measures parameters without the slices that are removed from them.

    Args:
        context: The request.
        parameters: As they are before.
        shrinking: The kept slices.

    Returns:
        The counts. Parameters that lose slices have weights without data.
    """
    sent, large = dict(parameters), dict[str, Sparsity]()
    for name in context.each(parameters.keys() & shrinking.slices.keys()):
        smaller = smaller_parameter(context, parameters[name], shrinking.slices[name])
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
    named = {(m.tensor, m.dim): (group, m) for group in groups for m in group.members}
    for name, counts in context.each(zero_slices.items()):
        for dim, count in enumerate(counts):
            if count and (name, dim) in named:
                yield Uncut(name, dim, count, _reason(context, *named[name, dim], parameters))
            elif count and dim < 2:
                yield Uncut(name, dim, count, "no group names slices along this dimension")


def _reason(
    context: RequestContext, group: Group, member: Member, parameters: Mapping[str, Parameter]
) -> str:
    """Why slices of a member that are zero were not removed."""

    def kept_of(one: Member) -> Tensor:
        mask = candidate_units(context, Group(group.name, (one,)), parameters)
        return torch.ones(one.units, dtype=torch.bool) if mask is None else mask.flags(0, one.units)

    pruned = ~kept_of(member)
    if not bool(pruned.any()):
        return "they are zero, but no mask prunes them: PRIOR_ZEROS counts zeros as pruned"
    for other in context.each(group.members):
        if other is not member and bool((pruned & kept_of(other)).any()):
            return (
                f"group {quote(group.name)}: {quote(other.tensor)} has unpruned elements in the "
                "same units"
            )
    return f"group {quote(group.name)}: a group keeps at least one unit"
