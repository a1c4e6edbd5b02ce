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
    """

    path: str
    tensor: str
    dim: int
    offset: int
    stride: int
    units: int
    indices: Sequence[int]
    is_scored: bool


@dataclass(frozen=True)
class Group:
    """Slices of several tensors that are pruned together."""

    name: str
    members: tuple[Member, ...]
