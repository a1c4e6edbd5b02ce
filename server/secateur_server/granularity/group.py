"""Groups: slices of several tensors that are pruned together."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """The part of a tensor in a group: `units` times some slices along a dimension.

    indices: of the slices, units x slices of one; an array where a caller chose how many.
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
    """Slices of several tensors that live and die together."""

    name: str
    members: tuple[Member, ...]
