"""Amounts: how much a selection prunes of the units that are compared.

One class for each kind. A new kind is a class here, and a line in AMOUNTS.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange, InvalidSpec, quote
from secateur_server.fields import check_length, fraction_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import by_tensor, first_matches, not_pruned

Ints = npt.NDArray[np.integer[Any]]

# The most operations of one unit: so their sums are finite, and exact for most models.
MOST_OPERATIONS = 1e15

# As PruningSpec in spec.proto lists it.
MOST_ENTRIES = 100_000


class Amount(Protocol):
    """How much is pruned.

    Attributes:
        field: The path of the amount in its selection.
        is_share: Whether it is a fraction or a count of the units, the same for all tensors.
        is_per_tensor: Whether it differs from tensor to tensor, so that tensors cannot be compared.
        counted: The name of what a budget counts, for errors.
        counts: The number of units of each tensor, by its name, if it is decided already.
    """

    field: ClassVar[str]
    is_share: ClassVar[bool] = False
    is_per_tensor: ClassVar[bool] = False
    counted: ClassVar[str] = "units"
    counts: "Mapping[str, int] | None" = None

    @property
    def is_everything(self) -> bool:
        """Whether it is known that all units are pruned."""
        return False

    @property
    def threshold(self) -> float | None:
        """The score below which units are pruned. None: as many as another property says."""
        return None

    @property
    def budget(self) -> float | None:
        """What all kept units may cost. None: units are counted, and cost 1 each."""
        return None

    def share(self, name: str) -> "Fraction | Count | None":
        """The fraction or count of the units of a tensor; None for other kinds."""
        return None

    def unit_cost(self, name: str, unit_bytes: int | None) -> float:
        """The cost of a unit of a tensor. `unit_bytes` is None if its units differ."""
        return 1

    def check(self, path: str, name: str, shape: Sequence[int], unit_elements: int | None) -> None:
        """Refuses a tensor whose units cannot have this amount.

        Args:
            path: The path of the selection in the request.
            name: The name of the tensor.
            shape: The shape of the tensor.
            unit_elements: Elements of each unit; None if units differ.

        Raises:
            AmountOutOfRange: The units cannot have this amount.
        """
        return

    def resolve(
        self, context: RequestContext, path: str, names: Sequence[str], known: Mapping[str, str]
    ) -> "Amount":
        """Replaces names and globs by the names of tensors.

        Args:
            context: The request.
            path: The path of the selection in the request.
            names: The tensors, or groups, that the rule prunes.
            known: Maps every name of these to the tensor.

        Raises:
            InvalidSpec: The names do not fit the tensors.
        """
        return self


@dataclass(frozen=True)
class Fraction(Amount):
    """A fraction of the units, in [0, 1]."""

    value: float

    field, is_share = "fraction", True

    @property
    def is_everything(self) -> bool:
        return self.value == 1.0

    @property
    def fraction(self) -> float | None:
        """The fraction; None for a count."""
        return self.value

    def share(self, name: str) -> "Fraction | Count":
        return self

    def units(self, base: int) -> int:
        """The number of units, of `base`; rounded as torch does."""
        return round(self.value * base)

    def units_of_each(self, bases: Ints) -> Ints:
        """The number of units of each base."""
        units: Ints = np.rint(self.value * bases).astype(np.int64)
        return units


@dataclass(frozen=True)
class Count(Amount):
    """A number of units."""

    value: int

    field, is_share, fraction = "count", True, None

    def share(self, name: str) -> "Fraction | Count":
        return self

    def units(self, base: int) -> int:
        return self.value

    def units_of_each(self, bases: Ints) -> Ints:
        return np.full(bases.shape, self.value, np.int64)


@dataclass(frozen=True)
class Threshold(Amount):
    """All units whose score is below `value`."""

    value: float

    field = "threshold"

    @property
    def threshold(self) -> float:
        return self.value


@dataclass(frozen=True)
class Bytes(Amount):
    """As few units as leave at most `target` bytes of elements."""

    target: float

    field, counted = "bytes", "bytes"

    @property
    def budget(self) -> float:
        return self.target

    def unit_cost(self, name: str, unit_bytes: int | None) -> float:
        return unit_bytes or 0

    def check(self, path: str, name: str, shape: Sequence[int], unit_elements: int | None) -> None:
        if unit_elements is None:
            raise AmountOutOfRange(
                f"{path}.bytes", f"{quote(name)} {list(shape)} has units of several sizes"
            )


@dataclass(frozen=True)
class Macs(Amount):
    """As few units as leave at most `target` operations.

    Attributes:
        target: Operations of all kept units.
        per_unit: Operations of a unit, by the name of its tensor or group.
    """

    target: float
    per_unit: Mapping[str, float]

    field, counted = "macs.target", "operations"

    @property
    def budget(self) -> float:
        return self.target

    def unit_cost(self, name: str, unit_bytes: int | None) -> float:
        return self.per_unit[name]

    def resolve(
        self, context: RequestContext, path: str, names: Sequence[str], known: Mapping[str, str]
    ) -> "Macs":
        field = f"{path}.macs.per_unit"
        given, pruned = by_tensor(context, self.per_unit, field, known), set(names)
        for name in context.each(given):
            if name not in pruned:
                raise not_pruned(f"{field}[{quote(name)}]", "tensor")
        for name in names:
            if name not in given:
                raise InvalidSpec(field, f"{quote(name)} is missing; give its operations per unit")
        return replace(self, per_unit=given)


@dataclass(frozen=True)
class Table(Amount):
    """A fraction of the units of each tensor.

    Attributes:
        fractions: By name or glob, of which the first that matches a tensor counts. Once resolved,
            by name; other tensors have the fraction 0.
    """

    fractions: Mapping[str, float]

    field, is_per_tensor = "table", True

    def share(self, name: str) -> "Fraction | Count":
        return Fraction(self.fractions.get(name, 0.0))

    def resolve(
        self, context: RequestContext, path: str, names: Sequence[str], known: Mapping[str, str]
    ) -> "Table":
        path, fractions = f"{path}.table.entries", list(self.fractions.values())
        first = first_matches(
            context, path, list(self.fractions), known, lambda index: f"{path}[{index}].tensors"
        )
        return Table({name: fractions[index] for name, index in first.items()})


@dataclass(frozen=True)
class Counts(Amount):
    """A number of unpruned units of each tensor, which was decided. No request has it."""

    counts: Mapping[str, int]

    field = "count"


def _threshold(context: RequestContext, selection: pb.Selection, path: str) -> Threshold:
    if math.isnan(selection.threshold):
        raise AmountOutOfRange(f"{path}.threshold", "NaN is not a threshold; give a number")
    return Threshold(selection.threshold)


def _macs(context: RequestContext, selection: pb.Selection, path: str) -> Macs:
    macs, path = selection.macs, f"{path}.macs"
    if not macs.target >= 0:
        raise AmountOutOfRange(f"{path}.target", f"{macs.target} is not 0 or more")
    for name, cost in context.each(macs.per_unit.items()):
        if not 0 < cost <= MOST_OPERATIONS:
            raise AmountOutOfRange(
                f"{path}.per_unit[{quote(name)}]", f"{cost} is not in (0, {MOST_OPERATIONS:g}]"
            )
    return Macs(macs.target, dict(context.each(macs.per_unit.items())))


def _table(context: RequestContext, selection: pb.Selection, path: str) -> Table:
    path, entries = f"{path}.table.entries", selection.table.entries
    if not entries:
        raise InvalidSpec(path, "at least one entry is needed")
    check_length(path, entries, MOST_ENTRIES, "entries")
    fractions: dict[str, float] = {}
    for index, entry in enumerate(context.each(entries)):
        if entry.tensors in fractions:
            raise InvalidSpec(
                f"{path}[{index}].tensors", f"{quote(entry.tensors)} is listed twice; list it once"
            )
        fractions[entry.tensors] = fraction_of(entry.fraction, f"{path}[{index}].fraction")
    return Table(fractions)


# Each decodes its own field of a selection, whose path is for errors. A plan's amounts are messages
# with the same fields.
AMOUNTS: dict[str, Callable[[RequestContext, Any, str], Amount]] = {
    "fraction": lambda _, given, path: Fraction(fraction_of(given.fraction, f"{path}.fraction")),
    "count": lambda _, given, path: Count(given.count),
    "threshold": _threshold,
    "bytes": lambda _, given, path: Bytes(given.bytes),
    "macs": _macs,
    "table": _table,
}
