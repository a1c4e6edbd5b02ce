"""Groups: slices of several tensors that are pruned together."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """The part of a tensor in a group: some slices along a dimension for each unit.

    Attributes:
        path: In the request.
        tensor: Its name.
        dim: The dimension of the slices.
        offset: The index of the first slice.
        stride: Slices of one unit.
        units: How many units there are.
        indices: Of the slices of all units, instead of offset and stride; an array if not empty.
        is_scored: Whether it counts in the scores of the units.
        is_masked: Whether it is pruned with its units. Else it is only cut with them.
    """

    path: str
    tensor: str
    dim: int
    offset: int
    stride: int
    units: int
    indices: Sequence[int]
    is_scored: bool
    is_masked: bool = True

    @property
    def slices_of_unit(self) -> int:
        """How many slices each unit of a resolved member has."""
        return len(self.indices) // self.units if len(self.indices) else self.stride


@dataclass(frozen=True)
class Group:
    """Slices of several tensors that are pruned together.

    Attributes:
        name: Of the group.
        members: The slices that are pruned with their units.
        unmasked: The slices that keep their values, and are only cut with their units.
    """

    name: str
    members: tuple[Member, ...]
    unmasked: tuple[Member, ...] = ()

    @property
    def units(self) -> int:
        """How many units a resolved group has."""
        return self.members[0].units

    @property
    def every(self) -> tuple[Member, ...]:
        """All members."""
        return (*self.members, *self.unmasked)
