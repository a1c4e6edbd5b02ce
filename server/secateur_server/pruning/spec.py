"""A pruning spec: four independent choices, and every method a point in their product."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur_server.devices.passes import Seen
from secateur_server.pruning.masks import Mask, any_of_slices, mask_of, spread


@dataclass(frozen=True)
class Magnitude:
    """Importance is a norm. p: the order; "nuc" is the nuclear norm of a slice as a matrix."""

    p: float | Literal["nuc"] = 1.0


@dataclass(frozen=True)
class Random:
    """Importance is a pseudo-random number. seed: in [0, 2^64)."""

    seed: int


@dataclass(frozen=True)
class Element:
    """Every element is a unit."""

    def units(self, shape: Sequence[int]) -> int:
        """How many units a tensor of `shape` has."""
        return math.prod(shape)

    def alive(self, mask: Mask, shape: Sequence[int]) -> Mask:
        """Which units have an unpruned element left."""
        return mask

    def spread(self, kept: Mask, shape: Sequence[int]) -> Mask:
        """The mask of a tensor of `shape` from that of its units."""
        return kept


@dataclass(frozen=True)
class Slice:
    """All elements with one index in a dimension are a unit.  dim: may be negative."""

    dim: int

    def units(self, shape: Sequence[int]) -> int:
        """As Element.units."""
        return shape[self.dim]

    def alive(self, mask: Mask, shape: Sequence[int]) -> Mask:
        """As Element.alive."""
        found = any_of_slices(mask.flags, shape, self.dim, mask.bits.device)
        return mask_of(lambda begin, end: found[begin:end], len(found), found.device)

    def spread(self, kept: Mask, shape: Sequence[int]) -> Mask:
        """As Element.spread."""
        return spread(kept.flags(0, kept.elements), shape, self.dim)


@dataclass(frozen=True)
class Selection:
    """Prune the least important units.

    path: of this rule in the request, for errors.  tensors: names and globs.
    is_global: rank all tensors together.  amount: a float is a fraction, an int a number.
    scores: from a tensor's name to that of the tensor that holds its scores.
    """

    path: str
    tensors: tuple[str, ...]
    importance: Magnitude | Random
    granularity: Element | Slice
    is_global: bool
    amount: float | int
    scores: Mapping[str, str]

    def extras(self) -> Collection[str]:
        """Names of uploaded tensors that are not part of the model."""
        return self.scores.values()

    def names(self) -> Collection[str]:
        """What it prunes: of a resolved rule names, not globs."""
        return self.tensors


@dataclass(frozen=True)
class CustomMasks:
    """Prune by masks.  masks: from a tensor's name to that of the tensor that holds its mask."""

    path: str
    masks: Mapping[str, str]

    def extras(self) -> Collection[str]:
        """As Selection.extras."""
        return self.masks.values()

    def names(self) -> Collection[str]:
        """As Selection.names."""
        return self.masks.keys()


Rule = Selection | CustomMasks


@dataclass(frozen=True)
class Parameter:
    """A tensor that can be pruned.

    weight: floating; only measure.fold writes to it.
    mask: of its elements; None where the tensor was never pruned.
    seen: what a first look at its elements told, where there was one.
    """

    weight: Tensor
    mask: Mask | None = None
    seen: Seen | None = None

    @property
    def is_nonzero(self) -> bool:
        """Whether it is known that no element of the weight itself is zero."""
        return self.seen is not None and not self.seen.zeros


# F8 and integers: a later method's.
PRUNABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
