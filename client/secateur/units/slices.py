"""The slices of the units of a group's members."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from secateur.errors import InvalidSpec
from secateur.grouping import Groups, groups_of
from secateur.model import Source
from secateur_proto import spec_pb2 as pb

Indices = npt.NDArray[np.intp]


class Slices(NamedTuple):
    """The slices of one tensor in a group.

    Attributes:
        name: As in the source's `prunable()`: the first name of a tied tensor, X of a pair.
        given: As the group spells it.
        dim: The dimension of the slices, from 0.
        of: [units, slices of a unit], the indices of the slices.
        is_scored: Whether the tensor has influence on how important a unit is.
    """

    name: str
    given: str
    dim: int
    of: Indices
    is_scored: bool


def checked_groups(groups: Groups) -> dict[str, pb.Group]:
    """Returns groups by their names.

    Raises:
        InvalidSpec: There are none, or two have one name.
    """
    found = groups_of(groups)
    named = {group.name: group for group in found}
    if not found:
        raise InvalidSpec("groups: is empty; at least one group is needed")
    if len(named) < len(found):
        names = [group.name for group in found]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidSpec(f"groups: two groups have the name {twice!r}; give each its own")
    return named


def slices_in(group: pb.Group, source: Source) -> list[Slices]:
    """Returns the slices of a group's members.

    Args:
        group: The group.
        source: The model, with buffers among its tensors.

    Raises:
        InvalidSpec: The model has no such tensor, dimension or slice, or the numbers of units
            differ.
    """
    found = list(_found(group, source))
    if not found:
        raise InvalidSpec(f"{group.name}: the group has no members")
    units = {len(one.of) for one in found}
    if len(units) > 1:
        counts = ", ".join(f"{len(one.of)} of {one.given}" for one in found)
        raise InvalidSpec(f"{group.name}: the members have different numbers of units: {counts}")
    return found


def _found(group: pb.Group, source: Source) -> Iterator[Slices]:
    names, weights = source.prunable_names(), source.prunable()
    for member in group.members:
        name = names.get(member.tensor, member.tensor)
        tensor = weights.get(name, source.tensors.get(name))
        place = f"{group.name}: {member.tensor}"
        if tensor is None:
            raise InvalidSpec(f"{place}: the model has no tensor of this name")
        dims = len(tensor.shape)
        if not -dims <= member.dim < dims:
            raise InvalidSpec(f"{place}: dim {member.dim} is outside [{-dims}, {dims})")
        dim = member.dim % dims
        of = _indices(place, member, tensor.shape[dim])
        yield Slices(name, member.tensor, dim, of, not member.unscored and not member.unmasked)


def _indices(place: str, member: pb.Member, size: int) -> Indices:
    """The slices of each unit, of a dimension of some size."""
    stride = member.stride or 1
    if member.indices:
        units = member.units or len(member.indices)
        if len(member.indices) % units:
            raise InvalidSpec(f"{place}: {len(member.indices)} indices are not {units} equal units")
        of: Indices = np.array(member.indices, np.intp).reshape(units, -1)
    else:
        units = member.units or max(0, (size - member.offset) // stride)
        of = member.offset + np.arange(units * stride, dtype=np.intp).reshape(units, stride)
    if not of.size or int(of.max()) >= size:
        last = int(of.max()) if of.size else member.offset
        raise InvalidSpec(f"{place}: slice {last} is outside [0, {size}) of dim {member.dim}")
    return of
