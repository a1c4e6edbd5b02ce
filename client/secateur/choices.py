"""The choices that a method is made of: importance, granularity, amount and guard rails.

A choice is what one of these functions makes. In plain data, as a spec file has it, it is the name
of the function, or a map of one entry from the name to the function's arguments.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from secateur.checks import (
    UINT64,
    chosen,
    dimension,
    flag,
    fraction,
    integer,
    integers,
    made,
    norm,
    one_of,
    patterns,
    real,
    shown,
    size,
)
from secateur.errors import InvalidSpec
from secateur.tensors import is_text
from secateur_proto import spec_pb2 as pb

Plain = Mapping[str, Any]

_SCOPES = {
    "row": pb.SCOPE_PER_ROW,
    "tensor": pb.SCOPE_PER_TENSOR,
    "global": pb.SCOPE_GLOBAL,
    "isomorphic": pb.SCOPE_ISOMORPHIC,
}
_NORMALIZATIONS = {
    "mean": pb.NORMALIZATION_MEAN,
    "norm": pb.NORMALIZATION_NORM,
    "z_score": pb.NORMALIZATION_Z_SCORE,
}
ALLOCATIONS = {
    "rank": pb.ALLOCATION_RANK,
    "uniform": pb.ALLOCATION_UNIFORM,
    "erk": pb.ALLOCATION_ERK,
    "lamp": pb.ALLOCATION_LAMP,
}

_LONGEST_PATTERN = 1024


@dataclass(frozen=True)
class Importance:
    """How important a unit is.  fields: of the wire's Selection."""

    fields: Plain


@dataclass(frozen=True)
class Granularity:
    """What is pruned as one: a unit.  fields: of the wire's Selection."""

    fields: Plain


@dataclass(frozen=True)
class Amount:
    """How much is pruned.  fields: of the wire's Selection."""

    fields: Plain


@dataclass(frozen=True)
class Rail:
    """Bounds on how much of a tensor is pruned.  message: without the tensors."""

    message: pb.Rail


@dataclass(frozen=True)
class GuardRails:
    """Bounds on how much is pruned, and of what."""

    message: pb.GuardRails


AnyImportance = Importance | str | Plain
AnyGranularity = Granularity | str | Plain
AnyAmount = Amount | float | str | Plain
AnyGuardRails = GuardRails | Plain


def magnitude(p: float | str = 1) -> Importance:
    """By the norm of the unit; of elements |w|.

    p: a number, inf or -inf; "fro"; or "nuc" for slices of tensors of 3 dimensions.
    """
    return Importance({"magnitude": norm("p", p)})


def random(seed: int = 0) -> Importance:
    """At random.  seed: in [0, 2^64). The same seed prunes the same units on every machine."""
    return Importance({"random": pb.Random(seed=integer("seed", seed, 0, UINT64))})


def element() -> Granularity:
    """Single elements."""
    return Granularity({"granularity": pb.GRANULARITY_ELEMENT})


def slices(dim: int = 0) -> Granularity:
    """All elements with one index in `dim`, which is negative to count from the end."""
    return Granularity({"granularity": pb.GRANULARITY_SLICE, "dim": dimension(dim)})


def rows() -> Granularity:
    """Rows of matrices: slices(0)."""
    return slices(0)


def filters() -> Granularity:
    """Filters of convolutions, all that makes one output channel: slices(0)."""
    return slices(0)


def columns() -> Granularity:
    """Columns, of the tensor as a matrix: its first dimension, and all others as one."""
    return _blocks([0, 1], as_matrix=True)


def heads(head_dim: int) -> Granularity:
    """Blocks of `head_dim` rows, of the tensor as a matrix: what an attention head has of it."""
    return _blocks([integer("head_dim", head_dim, 1, UINT64), 0], as_matrix=True)


def kernels(dims: int = 4) -> Granularity:
    """Kernels of convolutions: all elements of one filter and one input channel.

    dims: dimensions of the tensor, 3 or more; 4 is a Conv2d's.
    """
    return _blocks([1, 1, *[0] * (integer("dims", dims, 3, 65) - 2)])


def blocks(rows: int, cols: int) -> Granularity:
    """Blocks of the tensor as a matrix: its first dimension, and all others as one.

    rows, cols: lengths of a block; 0 is the whole dimension. At the end of a dimension that a
    length does not divide, blocks are smaller.
    """
    lengths = [integer("rows", rows, 0, UINT64), integer("cols", cols, 0, UINT64)]
    return _blocks(lengths, as_matrix=True)


def blocks_of(shape: Sequence[int]) -> Granularity:
    """Blocks of the tensor's own dimensions.  shape: a length for each, as of `blocks`."""
    return _blocks(integers("shape", shape))


def n_m(n: int = 2, m: int = 4, dim: int = 1) -> Granularity:
    """At most n of m elements are kept that lie side by side along `dim`.

    n: in [1, m).  m: at most 1024.  An amount of 1.0 is the pattern as sparse tensor cores have it.
    """
    m = integer("m", m, 2, _LONGEST_PATTERN + 1)
    pattern = pb.Pattern(n=integer("n", n, 1, m), m=m)
    return Granularity(
        {"granularity": pb.GRANULARITY_N_M, "pattern": pattern, "dim": dimension(dim)}
    )


def threshold(value: float) -> Amount:
    """The units go whose importance is below `value`."""
    return Amount({"threshold": real("value", value)})


def target_bytes(n: int | str) -> Amount:
    """As few units go as leave `n` bytes; a unit with any element left counts whole.

    n: a number, or a text such as "5GB" or "512MiB".
    """
    return Amount({"bytes": size("n", n)})


def target_macs(target: float, per_unit: Mapping[str, float]) -> Amount:
    """As few units go as leave `target` operations.

    per_unit: operations of one unit, above 0, by the name of each tensor, or group, of the rule.
    """
    if not isinstance(per_unit, Mapping) or not all(map(is_text, per_unit)):
        raise InvalidSpec(f"per_unit: {shown(per_unit)} is no map from names to numbers")
    costs = {name: real(f"per_unit[{name!r}]", cost) for name, cost in per_unit.items()}
    for name, cost in costs.items():
        if not 0 < cost < math.inf:
            raise InvalidSpec(f"per_unit[{name!r}]: {cost} is not above 0 and finite")
    if not (target := real("target", target)) >= 0:
        raise InvalidSpec(f"target: {target} is no number of operations")
    return Amount({"macs": pb.Macs(target=target, per_unit=costs)})


def table(fractions: Mapping[str, float | str]) -> Amount:
    """Each tensor has a fraction of its own.

    fractions: by name or glob, of which the first that matches counts. What none matches stays.
    """
    if not isinstance(fractions, Mapping) or not fractions or not all(map(is_text, fractions)):
        raise InvalidSpec(
            f"fractions: {shown(fractions)} is no map from names or globs to fractions"
        )
    entries = [
        pb.TableEntry(tensors=name, fraction=fraction(f"fractions[{name!r}]", value))
        for name, value in fractions.items()
    ]
    return Amount({"table": pb.Table(entries=entries)})


def rail(
    max_sparsity: float | None = None, min_sparsity: float | None = None, keep_at_least: int = 0
) -> Rail:
    """Bounds on how much of a tensor, or group, is pruned in the end, prior pruning among it.

    max_sparsity, min_sparsity: fractions of its units, in [0, 1].  keep_at_least: units.
    """
    message = pb.Rail(keep_at_least=integer("keep_at_least", keep_at_least, 0, UINT64))
    if max_sparsity is not None:
        message.max_sparsity = fraction("max_sparsity", max_sparsity)
    if min_sparsity is not None:
        message.min_sparsity = fraction("min_sparsity", min_sparsity)
        if max_sparsity is not None and min_sparsity > max_sparsity:
            raise InvalidSpec(f"min_sparsity: {min_sparsity} is above {max_sparsity}, the most")
    return Rail(message)


def guard_rails(
    max_sparsity: float | None = None,
    min_sparsity: float | None = None,
    keep_at_least: int = 0,
    keep_first: bool = False,
    keep_last: bool = False,
    exclude: str | Sequence[str] = (),
    per_tensor: Mapping[str, Rail | Plain] | None = None,
) -> GuardRails:
    """Bounds that hold all together; within them the amount is met exactly, or it is an error.

    max_sparsity, min_sparsity, keep_at_least: of each tensor, as of `rail`.
    keep_first, keep_last: the first and the last tensor of the rule stay as they are.
    exclude: names and globs of tensors that do.
    per_tensor: a rail, or its arguments, by name or glob; the first that matches a tensor holds in
        place of the general bounds.
    """
    general = rail(max_sparsity, min_sparsity, keep_at_least)
    if not isinstance(per_tensor, Mapping | None):
        raise InvalidSpec(f"per_tensor: {shown(per_tensor)} is no map from names to rails")
    rails = [_rail_of(name, bounds) for name, bounds in (per_tensor or {}).items()]
    if general.message != pb.Rail():
        rails.append(general.message)
    message = pb.GuardRails(
        rails=rails,
        keep_first=flag("keep_first", keep_first),
        keep_last=flag("keep_last", keep_last),
        exclude=[] if isinstance(exclude, tuple) and not exclude else patterns(exclude, "exclude"),
    )
    return GuardRails(message)


def importance_of(value: Any) -> Importance:
    """An importance by itself, or from plain data.  Errors: InvalidSpec."""
    return chosen("importance", value, Importance, IMPORTANCES)


def granularity_of(value: Any) -> Granularity:
    """As importance_of."""
    return chosen("granularity", value, Granularity, GRANULARITIES)


def amount_of(value: Any) -> Amount:
    """As importance_of; an int is a number of units, a float or "50%" a fraction of them."""
    if isinstance(value, Amount | Mapping):
        return chosen("amount", value, Amount, AMOUNTS)
    return Amount(units_of("amount", value))


def units_of(field: str, value: Any) -> dict[str, Any]:
    """A number of units, or a fraction of them, as the wire has it.  Errors: InvalidSpec."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return {"count": integer(field, value, 0, UINT64)}
    return {"fraction": fraction(field, value)}


def guard_rails_of(value: Any) -> GuardRails:
    """As importance_of; plain data has the arguments alone."""
    return made("guard_rails", value, GuardRails, guard_rails)


def ranking_of(
    scope: str, normalization: str | None, of_all: bool, guard_rails: AnyGuardRails | None
) -> dict[str, Any]:
    """The choices that selections of all kinds have, as the wire has them.  Errors: InvalidSpec."""
    fields: dict[str, Any] = {
        "scope": one_of("scope", scope, _SCOPES),
        "of_all": flag("of_all", of_all),
    }
    if normalization is not None:
        fields["normalization"] = one_of("normalization", normalization, _NORMALIZATIONS)
    if guard_rails is not None:
        fields["guard_rails"] = guard_rails_of(guard_rails).message
    return fields


IMPORTANCES: dict[str, Callable[..., Importance]] = {
    make.__name__: make for make in (magnitude, random)
}
GRANULARITIES: dict[str, Callable[..., Granularity]] = {
    make.__name__: make
    for make in (element, slices, rows, columns, filters, heads, kernels, blocks, blocks_of, n_m)
}
AMOUNTS: dict[str, Callable[..., Amount]] = {
    make.__name__: make for make in (threshold, target_bytes, target_macs, table)
}


def _blocks(shape: list[int], as_matrix: bool = False) -> Granularity:
    if not any(shape):
        raise InvalidSpec(f"shape: {shape} has no length that is not 0")
    block = pb.Block(shape=shape, as_matrix=as_matrix)
    return Granularity({"granularity": pb.GRANULARITY_BLOCK, "block": block})


def _rail_of(name: Any, bounds: Any) -> pb.Rail:
    """The rail of the tensors that a name or a glob means."""
    message = pb.Rail(tensors=patterns(name, "per_tensor"))
    message.MergeFrom(made(f"per_tensor[{name!r}]", bounds, Rail, rail).message)
    return message
