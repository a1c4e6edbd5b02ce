"""A pruning spec: four independent choices, and every method a point in their product."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from secateur_server.granularity import Granularity
from secateur_server.granularity.group import Group
from secateur_server.importance import Importance
from secateur_server.spec.amounts import Amount


@dataclass(frozen=True)
class Rail:
    """Bounds on the units of a tensor that are pruned in the end.

    path: in the request.  tensors: names and globs; of a resolved rail names.
    """

    path: str
    tensors: tuple[str, ...]
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    keep_at_least: int = 0


@dataclass(frozen=True)
class GuardRails:
    """The first rail that names a tensor is its only one.

    keep_first, keep_last: of the rule's tensors, in the state_dict's order; and exclude: those that
    stay as they are.
    """

    rails: tuple[Rail, ...] = ()
    keep_first: bool = False
    keep_last: bool = False
    exclude: tuple[str, ...] = ()

    @cached_property
    def by_tensor(self) -> Mapping[str, Rail]:
        """The rail of each tensor that has one; of resolved rails only."""
        return {name: rail for rail in self.rails for name in rail.tensors}


Scope = Literal["row", "tensor", "global", "isomorphic"]
Combination = Literal["mean", "sum", "max"]
Normalization = Literal["mean", "norm", "z_score"]
Allocation = Literal["rank", "uniform", "erk", "lamp"]


@dataclass(frozen=True)
class Selection:
    """Prune the least important units.

    path: of this rule in the request, for errors.  tensors: names and globs.
    granularity: None where the units are those of `groups`.
    amount: a float is a fraction, an int a number.
    of_all: the amount is of all units, and not of those that are still unpruned.
    scores: from a tensor's name to that of the tensor that holds its scores.
    scales: the same, of tensors of the model.
    """

    path: str
    tensors: tuple[str, ...]
    importance: Importance
    granularity: Granularity | None
    scope: Scope
    amount: Amount
    scores: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    of_all: bool = False
    groups: tuple[Group, ...] = ()
    combination: Combination = "mean"
    normalization: Normalization | None = None
    allocation: Allocation = "rank"
    guard_rails: GuardRails = GuardRails()

    @property
    def has_element_units(self) -> bool:
        """Whether each unit is one element."""
        return self.granularity is not None and self.granularity.is_element

    @property
    def has_partial_units(self) -> bool:
        """As Granularity.is_part."""
        return self.granularity is not None and self.granularity.is_part

    @cached_property
    def groups_by_name(self) -> Mapping[str, Group]:
        """The groups by their names."""
        return {group.name: group for group in self.groups}

    def extras(self) -> Collection[str]:
        """Names of uploaded tensors that are not part of the model."""
        return self.scores.values()

    def names(self) -> Collection[str]:
        """What it prunes: of a resolved rule names, not globs."""
        return self.tensors

    def reads(self) -> Collection[str]:
        """What of the model it needs: what it prunes, and what that is ranked by."""
        return {*self.names(), *self.scales.values()}


@dataclass(frozen=True)
class CustomMasks:
    """Prune by masks.

    masks: names of tensors, each with that of the tensor that holds its mask. A tied tensor may
        have a mask for each of its names: they hold together.
    """

    path: str
    masks: Sequence[tuple[str, str]]

    def extras(self) -> Collection[str]:
        """As Selection.extras."""
        return [holder for _, holder in self.masks]

    def names(self) -> Collection[str]:
        """As Selection.names."""
        return [name for name, _ in self.masks]

    def reads(self) -> Collection[str]:
        """As Selection.reads."""
        return self.names()


Rule = Selection | CustomMasks
