"""Slices of several tensors that are pruned together, as a filter and the channel that reads it."""

from array import array
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.keys import signed_bits
from secateur_server.backends.masks import Mask, expand, kept_slices, mask_of_flags
from secateur_server.backends.norms import vector_norms
from secateur_server.backends.pieces import around
from secateur_server.errors import DimOutOfRange, InvalidSpec, quote
from secateur_server.granularity.group import Group, Member
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog, unmatched
from secateur_server.state_dict.parameter import Parameter


def resolve_group(context: RequestContext, group: Group, catalog: Catalog) -> Group:
    """Finds the units of a group's members.

    Raises:
        InvalidSpec: Members do not fit their tensors, or each other.
    """
    members, unmasked = (
        tuple(_resolve_member(context, member, catalog) for member in context.each(of_kind))
        for of_kind in (group.members, group.unmasked)
    )
    resolved = replace(group, members=members, unmasked=unmasked)
    for member in context.each(resolved.every):
        if member.units != resolved.units:
            raise InvalidSpec(
                f"{member.path}.units",
                f"{quote(member.tensor)} has {member.units} units, "
                f"{quote(members[0].tensor)} of the same group {resolved.units}",
            )
    return resolved


def _resolve_member(context: RequestContext, member: Member, catalog: Catalog) -> Member:
    """The member with a dimension of 0 or more, and with its units."""
    tensor = catalog.name_of(member.tensor)
    shape = catalog.prunable.get(tensor)
    if shape is None and not member.is_masked:
        shape = catalog.shape_of_other(tensor)
    if shape is None:
        raise unmatched(context, f"{member.path}.tensor", tensor, catalog)
    if not -len(shape) <= member.dim < len(shape):
        raise DimOutOfRange(
            f"{member.path}.dim",
            f"{member.dim} is not in [{-len(shape)}, {len(shape)}) of {quote(member.tensor)} "
            f"{list(shape)}",
        )
    if 0 in shape:
        raise InvalidSpec(
            f"{member.path}.tensor", f"{quote(member.tensor)} {list(shape)} does not have elements"
        )
    dim = member.dim % len(shape)
    count_units = _units_of_indices if len(member.indices) else _units_of_range
    return replace(member, tensor=tensor, dim=dim, units=count_units(member, shape[dim]))


def _units_of_indices(member: Member, size: int) -> int:
    """The units of a member that lists its slices, out of `size`."""
    count = len(member.indices)
    units, indices = member.units or count, _indices(member)
    beyond = indices[(indices < 0) | (indices >= size)][:1].tolist()
    if count % units or beyond:
        shown = f", {beyond[0] % (1 << 64)} among them," if beyond else ""
        raise InvalidSpec(
            f"{member.path}.indices",
            f"{count} indices{shown} do not fit {units} units in the {size} slices of "
            f"{quote(member.tensor)}",
        )
    if count > size or int(torch.bincount(indices).max()) > 1:
        raise InvalidSpec(
            f"{member.path}.indices",
            f"{count} indices list one of the {size} slices of {quote(member.tensor)} twice; "
            "list each once",
        )
    return units


def _units_of_range(member: Member, size: int) -> int:
    """The units of a member whose slices follow each other, out of `size`."""
    units = member.units or max(0, size - member.offset) // member.stride
    if units == 0 or member.offset + units * member.stride > size:
        raise InvalidSpec(
            f"{member.path}.units",
            f"{units} units of {member.stride} slices from {member.offset} on do not fit in "
            f"the {size} slices of {quote(member.tensor)}",
        )
    return units


def _indices(member: Member) -> Tensor:
    """The indices as int64. Those of 2^63 and more are negative."""
    held = member.indices if isinstance(member.indices, array) else array("Q", member.indices)
    return torch.frombuffer(held, dtype=torch.int64)


def place_of(member: Member, device: torch.device) -> slice | Tensor:
    """Returns an index of the slices of all units, unit by unit, along the dimension."""
    if len(member.indices):
        return _indices(member).to(device)
    return slice(member.offset, member.offset + member.units * member.stride)


def slices_of(member: Member, device: torch.device) -> Tensor:
    """Returns the indices of the slices of each unit: int64, (units, slices of a unit)."""
    if len(member.indices):
        return _indices(member).to(device).view(member.units, -1)
    every = np.arange(member.offset, member.offset + member.units * member.stride)
    return torch.from_numpy(every.reshape(member.units, -1)).to(device)


def candidate_units(
    context: RequestContext, group: Group, parameters: Mapping[str, Parameter]
) -> Mask | None:
    """Returns the units with an unpruned element in any of their tensors; None if all are."""
    candidates: Tensor | None = None
    for member in context.each(group.members):
        parameter = parameters[member.tensor]
        mask, shape = parameter.mask, parameter.weight.shape
        if mask is None:
            return None
        found = kept_slices(context, mask, shape, member.dim)
        of_units = found[place_of(member, found.device)].view(member.units, -1).any(1)
        candidates = of_units if candidates is None else candidates | of_units
    assert candidates is not None, "a group has a member"
    return mask_of_flags(context, candidates)


def member_scores(
    context: RequestContext, member: Member, parameter: Parameter, p: float
) -> Tensor:
    """Computes the power mean of |w|^p over the elements of each unit. Pruned elements count as 0.

    Returns:
        Float64, one for each unit.
    """
    weight, mask = parameter.weight, parameter.mask
    outer, size, inner = around(weight.shape, member.dim)
    backend, elements = backend_for(weight.device), outer * inner * member.slices_of_unit
    parts = spans(member.units, max(1, backend.piece // 8 // max(1, elements)))
    by_slice = weight.reshape(outer, size, inner)
    if mask is None and member.stride == 1 and not len(member.indices):

        def norms_of(span: tuple[int, int]) -> Tensor:
            begin, end = (member.offset + unit for unit in span)
            return vector_norms(by_slice, begin, end, p, backend, elements)

        return torch.cat(backend.map(context, norms_of, parts))
    slices = slices_of(member, weight.device)
    kept = None if mask is None else mask.whole(context, (outer, size, inner))

    def scores_of(span: tuple[int, int]) -> Tensor:
        index = slices[slice(*span)].reshape(-1)
        part = signed_bits(by_slice)[0].index_select(1, index).view(by_slice.dtype)
        if kept is not None:
            part = torch.where(kept.index_select(1, index), part, torch.zeros_like(part))
        rows = part.transpose(0, 1).reshape(1, -1, elements).contiguous()
        return vector_norms(rows, 0, rows.shape[1], p, backend, elements)

    return torch.cat(backend.map(context, scores_of, parts))


def expand_group(
    context: RequestContext, kept: Mask, group: Group, parameters: Mapping[str, Parameter]
) -> dict[str, Mask]:
    """Expands a mask of a group's units to masks of its tensors."""
    units = kept.flags(0, kept.elements)
    masks: dict[str, Mask] = {}
    for member in context.each(group.members):
        shape = parameters[member.tensor].weight.shape
        slices = torch.ones(shape[member.dim], dtype=torch.bool, device=units.device)
        slices[place_of(member, units.device)] = units.repeat_interleave(member.slices_of_unit)
        mask = expand(context, slices, shape, member.dim)
        before = masks.get(member.tensor)
        masks[member.tensor] = mask if before is None else mask.both(context, before)
    return masks
