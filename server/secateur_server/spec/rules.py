"""Rules of a spec. A method is a point in the product of independent choices."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from secateur_server.granularity import Granularity
from secateur_server.granularity.group import Group
from secateur_server.importance import Importance
from secateur_server.spec.amounts import Amount
from secateur_server.spec.solve import Solve


@dataclass(frozen=True)
class Rail:
    """Bounds on the pruned units of a tensor, after all rules.

    Attributes:
        path: The path of the rail in the request.
        tensors: Names and globs; in a resolved rail, names.
        min_sparsity: At least this fraction of the units is pruned.
        max_sparsity: At most this fraction of the units is pruned.
        keep_at_least: At least this number of units is kept.
    """

    path: str
    tensors: tuple[str, ...]
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    keep_at_least: int = 0


@dataclass(frozen=True)
class GuardRails:
    """Bounds on what a rule prunes.

    Attributes:
        rails: The first rail that matches a tensor is its only one.
        keep_first, keep_last: Whether the first and the last of the rule's tensors, in the order
            of the state_dict, are not pruned.
        exclude: Names and globs of tensors that are not pruned.
    """

    rails: tuple[Rail, ...] = ()
    keep_first: bool = False
    keep_last: bool = False
    exclude: tuple[str, ...] = ()

    @cached_property
    def by_tensor(self) -> Mapping[str, Rail]:
        """The rail of each tensor that has one. Only for resolved rails."""
        return {name: rail for rail in self.rails for name in rail.tensors}


Scope = Literal["row", "tensor", "global", "isomorphic"]
Combination = Literal["mean", "sum", "max"]
Normalization = Literal["mean", "norm", "z_score"]
Allocation = Literal["rank", "uniform", "erk", "lamp", "owl"]


@dataclass(frozen=True)
class Selection:
    """Prunes the least important units.

    Attributes:
        path: The path of this rule in the request.
        tensors: Names and globs; in a resolved rule, names.
        importance: Scores units.
        granularity: What a unit is; None if units are those of `groups`.
        scope: Which units are compared.
        amount: How much is pruned.
        scores: From the name of a tensor to the uploaded tensor with its scores.
        scales: From the name of a tensor to the tensor of the state_dict with its scores.
        of_all: Whether the amount is of all units, instead of those that are still unpruned.
        groups: Slices of several tensors that are pruned together.
        combination: Makes the score of a group's unit from the scores of its members.
        normalization: Brings the scores of several tensors to one scale.
        floor: The lowest normalized score of tensors in other files that are compared with these;
            0 at most. No request has it.
        allocation: Divides the amount among tensors whose units are compared.
        guard_rails: Bounds on what is pruned.
        row_dims: The dimension of rows by name or glob; in a resolved rule, by name. Of others 0.
        align: Groups keep a multiple of this many units; 0 is one that suits each group's size.
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
    floor: float = 0.0
    allocation: Allocation = "rank"
    guard_rails: GuardRails = GuardRails()
    row_dims: Mapping[str, int] = field(default_factory=dict)
    align: int = 1

    @property
    def has_element_units(self) -> bool:
        """Whether each unit is one element."""
        return self.granularity is not None and self.granularity.is_element

    @property
    def has_partial_units(self) -> bool:
        """Whether a unit is part of a larger group, as Granularity.is_part says."""
        return self.granularity is not None and self.granularity.is_part

    @cached_property
    def groups_by_name(self) -> Mapping[str, Group]:
        """The groups by their names."""
        return {group.name: group for group in self.groups}

    def extras(self) -> Collection[str]:
        """The names of uploaded tensors that are not part of the state_dict."""
        uploads = self.importance.uploads.values()
        return [*self.scores.values(), *(name for of in uploads for name in of.values())]

    def streamed(self) -> Collection[str]:
        """The names of uploaded tensors that are used as they arrive, and not held."""
        return ()

    def patterns(self) -> Sequence[str]:
        """The names and globs by which a rule of the request selects tensors."""
        return self.tensors

    def names(self) -> Collection[str]:
        """The tensors that a resolved rule prunes."""
        return self.tensors

    def units_together(self) -> Sequence[Group]:
        """The groups of tensors that a resolved rule prunes."""
        return self.groups

    def reads(self) -> Collection[str]:
        """The tensors that a resolved rule reads: those that it prunes, and their scales."""
        return {*self.tensors, *self.scales.values()}

    def is_meant_whole(self, name: str) -> bool:
        """Whether the caller asks to prune the whole tensor."""
        share = self.amount.share(name)
        return share is not None and share.fraction == 1.0


@dataclass(frozen=True)
class CustomMasks:
    """Prunes by masks. Its methods are those of Selection.

    Attributes:
        path: The path of this rule in the request.
        masks: Names of tensors, each with that of the tensor that holds its mask. A tied tensor
            may have a mask for each of its names; an element is kept if all of them keep it.
    """

    path: str
    masks: Sequence[tuple[str, str]]

    def extras(self) -> Collection[str]:
        return [holder for _, holder in self.masks]

    def streamed(self) -> Collection[str]:
        return ()

    def patterns(self) -> Sequence[str]:
        return ()

    def names(self) -> Collection[str]:
        return [name for name, _ in self.masks]

    def units_together(self) -> Sequence[Group]:
        return ()

    def reads(self) -> Collection[str]:
        return self.names()

    def is_meant_whole(self, name: str) -> bool:
        return True  # the caller made the mask


Rule = Selection | CustomMasks | Solve
