"""Does the work of groups.py for many small groups at once.

The groups of a model are alike, as its layers are. One operation on the tensors of many groups
replaces several operations on each. The bits are the same. Large groups are taken one by one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import signed_bits
from secateur_server.backends.masks import Mask, flags_of, masks_of
from secateur_server.backends.norms import vector_norms
from secateur_server.backends.pieces import around
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.groups import (
    candidate_units,
    expand_group,
    member_scores,
    place_of,
    slices_of,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

Done = TypeVar("Done")
Parameters = Mapping[str, Parameter]

# Elements of groups that are taken at once. As float64 they fit in the second-level cache.
AT_ONCE = 1 << 17


def candidates_of(
    context: RequestContext, groups: Sequence[Group], parameters: Parameters
) -> list[Mask | None]:
    """Does candidate_units for each group."""

    def many(places: Sequence[int]) -> Sequence[Mask | None]:
        found: list[Tensor] = []
        for members in _slots(groups, places):
            masks = [parameters[member.tensor].mask for member in members]
            present = [mask for mask in masks if mask is not None]
            if len(present) < len(masks):
                return [None] * len(places)
            shape = parameters[members[0].tensor].weight.shape
            outer, size, inner = around(shape, members[0].dim)
            flags = flags_of(present).view(-1, outer, size, inner)
            found.append(_by_unit(flags.any(3).any(1), members).any(2))
        return masks_of(torch.stack(found).any(0))

    def one(place: int) -> Mask | None:
        return candidate_units(context, groups[place], parameters)

    return _each(context, groups, parameters, many, one)


def score_members(
    context: RequestContext, groups: Sequence[Group], parameters: Parameters, p: float
) -> list[list[Tensor]]:
    """Does member_scores for the scored members of each group."""

    def many(places: Sequence[int]) -> Sequence[list[Tensor]]:
        scored = (members for members in _slots(groups, places) if members[0].is_scored)
        columns = [_scores(members, parameters, p).unbind() for members in scored]
        return [list(of_group) for of_group in zip(*columns, strict=True)]

    def one(place: int) -> list[Tensor]:
        scored = (member for member in groups[place].members if member.is_scored)
        return [member_scores(context, m, parameters[m.tensor], p) for m in context.each(scored)]

    return _each(context, groups, parameters, many, one)


def expand_groups(
    context: RequestContext, groups: Sequence[Group], kept: Sequence[Mask], parameters: Parameters
) -> list[dict[str, Mask]]:
    """Does expand_group for each group. `kept` are the kept units of each."""

    def many(places: Sequence[int]) -> Sequence[dict[str, Mask]]:
        pruned = ~flags_of([kept[place] for place in places])
        found: list[dict[str, Mask]] = [{} for _ in places]
        for members in _slots(groups, places):
            expanded = _expanded(members, pruned, parameters)
            for masks, member, mask in zip(found, members, expanded, strict=True):
                before = masks.get(member.tensor)
                masks[member.tensor] = mask if before is None else mask.both(context, before)
        return found

    def one(place: int) -> dict[str, Mask]:
        return expand_group(context, kept[place], groups[place], parameters)

    return _each(context, groups, parameters, many, one)


def elements_of(group: Group, parameters: Parameters) -> int:
    """Counts the elements of the tensors of a group."""
    return sum(parameters[member.tensor].weight.numel() for member in group.members)


def _each(
    context: RequestContext,
    groups: Sequence[Group],
    parameters: Parameters,
    many: Callable[[Sequence[int]], Sequence[Done]],
    one: Callable[[int], Done],
) -> list[Done]:
    """Calls `many` with the indices of small groups that are alike, or `one` with a large one's."""
    if not groups:
        return []
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, group in enumerate(context.each(groups)):
        alike[tuple(_layout(member, parameters) for member in group.members)].append(place)
    batches: list[Sequence[int]] = []
    done: dict[int, Done] = {}
    places: Sequence[int]
    for places in context.each(alike.values()):
        size = elements_of(groups[places[0]], parameters)
        if size > AT_ONCE:
            done |= {place: one(place) for place in context.each(places)}
        else:
            batches += [places[slice(*span)] for span in spans(len(places), AT_ONCE // size)]
    backend = backend_for(parameters[groups[0].members[0].tensor].weight.device)
    for places, found in zip(batches, backend.map(context, many, batches), strict=True):
        done |= zip(places, found, strict=True)
    return [done[place] for place in range(len(groups))]


def _layout(member: Member, parameters: Parameters) -> Any:
    """A key that is equal for members whose slices one operation can take."""
    parameter = parameters[member.tensor]
    weight, count = parameter.weight, len(member.indices)
    where = (member.units, count) if count else (member.units, 0, member.offset, member.stride)
    return weight.shape, weight.dtype, parameter.mask is None, member.dim, member.is_scored, where


def _slots(groups: Sequence[Group], places: Sequence[int]) -> Iterator[tuple[Member, ...]]:
    """The first members of all groups, the second ones, and so on."""
    return zip(*(groups[place].members for place in places), strict=True)


def _by_unit(values: Tensor, members: Sequence[Member]) -> Tensor:
    """Values of all slices, (members, size, ...), as (members, units, slices of a unit, ...)."""
    places = _places(members, values.device)
    chosen = values[places] if isinstance(places, tuple) else values[:, places]
    return chosen.reshape(len(members), members[0].units, -1, *values.shape[2:])


def _places(members: Sequence[Member], device: torch.device) -> slice | tuple[Tensor, Tensor]:
    """An index of the slices of all units: along a dimension, or of members and slices."""
    place = place_of(members[0], device)
    if isinstance(place, slice):
        return place
    slices = torch.stack([slices_of(member, device).view(-1) for member in members])
    return torch.arange(len(members), device=device).view(-1, 1), slices


def _scores(members: Sequence[Member], parameters: Parameters, p: float) -> Tensor:
    """Does member_scores for each member.  Returns: (members, units)."""
    of_members = [parameters[member.tensor] for member in members]
    weight, first = of_members[0].weight, members[0]
    outer, _, inner = shape = around(weight.shape, first.dim)
    bits = torch.stack([signed_bits(parameter.weight)[0] for parameter in of_members])
    bits = bits.view(-1, *shape)
    masks = [parameter.mask for parameter in of_members if parameter.mask is not None]
    if masks:
        bits = bits * flags_of(masks).view(bits.shape)
    elements = outer * inner * first.slices_of_unit
    lines = _by_unit(bits.transpose(1, 2), members).contiguous()
    rows = lines.view(weight.dtype).view(1, -1, elements)
    norms = vector_norms(rows, 0, rows.shape[1], p, backend_for(weight.device), elements)
    return norms.view(len(members), -1)


def _expanded(members: Sequence[Member], pruned: Tensor, parameters: Parameters) -> list[Mask]:
    """The masks of the members' tensors. `pruned` is bool, (members, units)."""
    outer, size, inner = around(parameters[members[0].tensor].weight.shape, members[0].dim)
    kept = torch.ones(len(members), size, dtype=torch.bool, device=pruned.device)
    of_slices = (~pruned).repeat_interleave(members[0].slices_of_unit, 1)
    places = _places(members, pruned.device)
    kept[places if isinstance(places, tuple) else (slice(None), places)] = of_slices
    lines = kept.view(-1, 1, size, 1).expand(-1, outer, -1, inner)
    return masks_of(lines.reshape(len(members), -1))
