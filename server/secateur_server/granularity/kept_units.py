"""The units of groups that a shrunk model keeps, and the slices of tensors that they are."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidSpec, quote
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.groups import place_of, slices_of
from secateur_server.granularity.groups_at_once import candidates_of
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.slices import Shrinking


def distinct_groups(
    context: RequestContext, groups: Iterable[Group], catalog: Catalog
) -> list[Group]:
    """Returns each of several resolved groups once, though several rules may have it.

    Args:
        context: The request.
        groups: Resolved.
        catalog: Of the state_dict.

    Raises:
        InvalidSpec: Two members name one slice of a tensor, or two groups have one name.
    """
    found: dict[object, Group] = {}
    for group in context.each(groups):
        found.setdefault(frozenset(map(_slices_key, group.every)), group)
    _check_names(found.values())
    _check_disjoint(context, list(found.values()), catalog)
    return list(found.values())


def _check_disjoint(context: RequestContext, groups: Sequence[Group], catalog: Catalog) -> None:
    """Refuses two members that name one slice of a tensor."""
    owners: dict[tuple[str, int], Tensor] = {}
    members = [(group.name, member) for group in groups for member in group.every]
    counts = Counter((member.tensor, member.dim) for _, member in members)
    for place, (name, member) in enumerate(context.each(members)):
        at = member.tensor, member.dim
        if counts[at] == 1:  # a member alone names each slice once
            continue
        size = catalog.shape_of(member.tensor)[member.dim]
        owner = owners.setdefault(at, torch.full((size,), -1))
        slices = slices_of(member, owner.device).reshape(-1)
        taken = owner[slices]
        if bool((taken >= 0).any()):
            index = int(taken.ge(0).nonzero()[0])
            other_name, other = members[int(taken[index])]
            raise InvalidSpec(
                member.path,
                f"slice {int(slices[index])} along dimension {member.dim} of "
                f"{quote(member.tensor)} is in group {quote(name)}, and in {other.path} of group "
                f"{quote(other_name)}; a shrunk tensor needs each slice in one member",
            )
        owner[slices] = place


def _check_names(groups: Iterable[Group]) -> None:
    """Refuses groups of several rules whose reports would have one name."""
    seen: set[str] = set()
    for group in groups:
        if group.name in seen:
            path = group.members[0].path.rpartition(".")[0]
            raise InvalidSpec(
                f"{path}.name",
                f"groups with other slices are named {quote(group.name)}; rename one",
            )
        seen.add(group.name)


def _slices_key(member: Member) -> object:
    """Equal for members that are the same slices, unit by unit."""
    at = member.tensor, member.dim, member.units
    if len(member.indices):
        return (*at, bytes(memoryview(member.indices)))  # type: ignore[arg-type]
    return (*at, member.offset, member.stride)


def shrinking_of(
    context: RequestContext,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    catalog: Catalog,
) -> Shrinking:
    """Finds the units that are not wholly pruned, and the slices that remain with them.

    A group keeps its first unit if all are wholly pruned, since most frameworks have no layers of
    size 0.

    Args:
        context: The request.
        groups: As distinct_groups returns them.
        parameters: With their masks.
        catalog: Of the state_dict.
    """
    return shrinking_by(context, groups, candidates_of(context, groups, parameters), catalog)


def shrinking_by(
    context: RequestContext,
    groups: Sequence[Group],
    candidates: Sequence[Mask | None],
    catalog: Catalog,
) -> Shrinking:
    """Does shrinking_of, given the units that are not wholly pruned; None: all of a group."""
    remaining: dict[str, dict[int, Tensor]] = {}
    units: list[tuple[str, Tensor]] = []
    for group, mask in zip(context.each(groups), candidates, strict=True):
        kept = torch.ones(group.units, dtype=torch.bool)
        if mask is not None:
            kept = mask.flags(0, group.units).cpu()
            kept[0] |= not bool(kept.any())
        units.append((group.name, kept))
        if not bool(kept.all()):
            for member in context.each(group.every):
                _remove(remaining, member, kept, catalog)
    slices = {
        name: {dim: flags.nonzero().view(-1) for dim, flags in by_dim.items()}
        for name, by_dim in remaining.items()
    }
    unmasked = {member.tensor for group in groups for member in group.unmasked}
    return Shrinking(units, slices, unmasked)


def _remove(
    remaining: dict[str, dict[int, Tensor]], member: Member, kept: Tensor, catalog: Catalog
) -> None:
    """Flags the slices of a member that are kept with their units, and those that are not."""
    of_tensor = remaining.setdefault(member.tensor, {})
    if member.dim not in of_tensor:
        size = catalog.shape_of(member.tensor)[member.dim]
        of_tensor[member.dim] = torch.ones(size, dtype=torch.bool)
    flags, each = of_tensor[member.dim], member.slices_of_unit
    flags[place_of(member, flags.device)] = kept.repeat_interleave(each) if each > 1 else kept
