"""A pruning spec from the wire: every field checked that can be without the tensors."""

import math
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange, InvalidSpec, quote
from secateur_server.messages.rails import decode_rails
from secateur_server.messages.repeated import check_length
from secateur_server.pruning.granularity import NM, Block, Element, Granularity, Slice
from secateur_server.pruning.spec import (
    Allocation,
    Amount,
    Budget,
    Combination,
    CustomMasks,
    Group,
    Magnitude,
    Member,
    Normalization,
    Random,
    Rule,
    Scope,
    Selection,
    Table,
    Threshold,
)
from secateur_server.runtime.context import RequestContext

Choice = TypeVar("Choice")

SCOPES: dict[int, Scope] = {
    pb.SCOPE_PER_TENSOR: "tensor",
    pb.SCOPE_GLOBAL: "global",
    pb.SCOPE_ISOMORPHIC: "isomorphic",
}
ALLOCATIONS: dict[int, Allocation] = {
    pb.ALLOCATION_UNSPECIFIED: "rank",
    pb.ALLOCATION_RANK: "rank",
    pb.ALLOCATION_UNIFORM: "uniform",
    pb.ALLOCATION_ERK: "erk",
    pb.ALLOCATION_LAMP: "lamp",
}
NORMALIZATIONS: dict[int, Normalization | None] = {
    pb.NORMALIZATION_UNSPECIFIED: None,
    pb.NORMALIZATION_NONE: None,
    pb.NORMALIZATION_MEAN: "mean",
    pb.NORMALIZATION_NORM: "norm",
    pb.NORMALIZATION_Z_SCORE: "z_score",
}
COMBINATIONS: dict[int, Combination] = {
    pb.COMBINATION_UNSPECIFIED: "mean",
    pb.COMBINATION_MEAN: "mean",
    pb.COMBINATION_SUM: "sum",
    pb.COMBINATION_MAX: "max",
}

# A longer one is no pattern that hardware has, and takes long to rank.
LONGEST_PATTERN = 1024

# Of one unit: sums of them stay within the doubles, and whole numbers exact for most models.
MOST_OPERATIONS = 1e15

# As PruningSpec in spec.proto lists them.
MOST_RULES = 10_000
MOST_ENTRIES = 100_000
MOST_GROUPS = 20_000
MOST_MEMBERS = 100_000

# Indices that are copied between two checks of the call.
INDICES_AT_ONCE = 1 << 16


def decode_spec(context: RequestContext, spec: pb.PruningSpec) -> list[Rule]:
    """The rules of a spec.  Errors: InvalidSpec, naming the field by its path."""
    if not spec.rules:
        raise InvalidSpec("spec.rules", "a spec needs at least one rule")
    check_length("spec.rules", spec.rules, MOST_RULES, "rules")
    return [
        _rule(context, rule, f"spec.rules[{index}]")
        for index, rule in enumerate(context.each(spec.rules))
    ]


def _rule(context: RequestContext, rule: pb.Rule, path: str) -> Rule:
    if _chosen(rule, "method", path) == "selection":
        return _selection(context, rule.selection, f"{path}.selection")
    path = f"{path}.custom_masks"
    if not rule.custom_masks.masks:
        raise InvalidSpec(f"{path}.masks", "at least one mask is needed")
    return CustomMasks(path, list(rule.custom_masks.masks.items()))


def _selection(context: RequestContext, selection: pb.Selection, path: str) -> Selection:
    groups = _groups(context, selection, path)
    if not groups and not selection.tensors:
        raise InvalidSpec(f"{path}.tensors", "at least one name or glob is needed")
    granularity = _granularity(selection, path)
    decoded = Selection(
        path=path,
        tensors=tuple(selection.tensors),
        importance=_importance(selection, granularity, path),
        granularity=granularity,
        scope=_one_of(SCOPES, selection, "scope", path),
        amount=_amount(context, selection, path),
        scores=dict(context.each(selection.importance_scores.items())),
        scales=dict(context.each(selection.scales.items())),
        of_all=selection.of_all,
        groups=groups,
        combination=_one_of(COMBINATIONS, selection, "combination", path),
        normalization=_one_of(NORMALIZATIONS, selection, "normalization", path),
        allocation=_one_of(ALLOCATIONS, selection, "allocation", path),
        guard_rails=decode_rails(context, selection.guard_rails, f"{path}.guard_rails"),
    )
    _check_together(decoded)
    return decoded


def _check_together(rule: Selection) -> None:
    """Refuses choices that do not go together."""
    is_random = isinstance(rule.importance, Random)
    is_share = isinstance(rule.amount, float | int)
    is_bytes = isinstance(rule.amount, Budget) and rule.amount.per_unit is None
    refused = {
        "importance_scores": (is_random and rule.scores, "random importance takes no scores"),
        "scales": (
            rule.scales and (is_random or rule.groups),
            "neither random importance nor groups take any",
        ),
        "normalization": (is_random and rule.normalization, "random importance has none"),
        "threshold": (
            is_random and isinstance(rule.amount, Threshold),
            "random importance has no threshold",
        ),
        "allocation": (
            rule.allocation != "rank" and (not is_share or rule.scope == "tensor"),
            "divides a fraction or a count among tensors that are ranked together",
        ),
        "table": (
            isinstance(rule.amount, Table) and rule.scope != "tensor",
            "SCOPE_PER_TENSOR only",
        ),
        "bytes": (is_bytes and rule.granularity is None, "groups have units of several sizes"),
        "of_all": (rule.of_all and not is_share and not isinstance(rule.amount, Table), "no count"),
    }
    for field, (is_wrong, why) in refused.items():
        if is_wrong:
            raise InvalidSpec(f"{rule.path}.{field}", why)
    if rule.allocation == "erk" and rule.groups:
        raise InvalidSpec(f"{rule.path}.allocation", "groups have no dimensions for ERK")
    if rule.allocation == "lamp" and is_random:
        raise InvalidSpec(f"{rule.path}.allocation", "random importance has no LAMP")


def _one_of(choices: dict[int, Choice], selection: pb.Selection, field: str, path: str) -> Choice:
    value = getattr(selection, field)
    if value not in choices:
        raise InvalidSpec(f"{path}.{field}", f"{value} is no {field}")
    return choices[value]


def _granularity(selection: pb.Selection, path: str) -> Granularity | None:
    make = GRANULARITIES.get(selection.granularity)
    if make is None:
        raise InvalidSpec(f"{path}.granularity", f"{selection.granularity} is no granularity")
    return make(selection, path)


def _n_m(selection: pb.Selection, path: str) -> Granularity:
    n, m = selection.pattern.n, selection.pattern.m
    if not 1 <= n < m <= LONGEST_PATTERN:
        raise InvalidSpec(
            f"{path}.pattern", f"{n}:{m} is no pattern with 1 <= n < m <= {LONGEST_PATTERN}"
        )
    return NM(n, m, selection.dim)


def _block(selection: pb.Selection, path: str) -> Granularity:
    shape = tuple(selection.block.shape)
    if not any(shape):
        raise InvalidSpec(f"{path}.block.shape", "at least one length that is not 0 is needed")
    return Block(shape, selection.block.as_matrix)


GRANULARITIES: dict[int, Callable[[pb.Selection, str], Granularity | None]] = {
    pb.GRANULARITY_ELEMENT: lambda selection, path: Element(),
    pb.GRANULARITY_SLICE: lambda selection, path: Slice(selection.dim),
    pb.GRANULARITY_N_M: _n_m,
    pb.GRANULARITY_BLOCK: _block,
    pb.GRANULARITY_GROUP: lambda selection, path: None,
}


def _groups(context: RequestContext, selection: pb.Selection, path: str) -> tuple[Group, ...]:
    is_grouped = selection.granularity == pb.GRANULARITY_GROUP
    if is_grouped != bool(selection.groups):
        why = "at least one group is needed" if is_grouped else "are for GRANULARITY_GROUP"
        raise InvalidSpec(f"{path}.groups", why)
    if is_grouped and selection.tensors:
        raise InvalidSpec(f"{path}.tensors", "the groups name their tensors")
    check_length(f"{path}.groups", selection.groups, MOST_GROUPS, "groups")
    members = sum(len(group.members) for group in context.each(selection.groups))
    if members > MOST_MEMBERS:
        raise InvalidSpec(
            f"{path}.groups",
            f"{members} members in all groups are more than {MOST_MEMBERS}; split the rule",
        )
    groups = tuple(
        _group(context, group, index, f"{path}.groups[{index}]")
        for index, group in enumerate(selection.groups)
    )
    names = [group.name for group in groups]
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise InvalidSpec(f"{path}.groups[{index}].name", f"{quote(name)} is there twice")
        seen.add(name)
    return groups


def _group(context: RequestContext, group: pb.Group, index: int, path: str) -> Group:
    if not group.members:
        raise InvalidSpec(f"{path}.members", "at least one member is needed")
    if all(member.unscored for member in context.each(group.members)):
        raise InvalidSpec(f"{path}.members", "at least one must be scored")
    members = tuple(
        _member(context, member, f"{path}.members[{place}]")
        for place, member in enumerate(context.each(group.members))
    )
    return Group(group.name or f"groups[{index}]", members)


def _member(context: RequestContext, member: pb.Member, path: str) -> Member:
    if member.indices and (member.offset or member.stride):
        raise InvalidSpec(f"{path}.indices", "take the place of offset and stride")
    return Member(
        path=path,
        tensor=member.tensor,
        dim=member.dim,
        offset=member.offset,
        stride=member.stride or 1,
        units=member.units,
        indices=_indices(context, member.indices),
        is_scored=not member.unscored,
    )


def _indices(context: RequestContext, indices: Sequence[int]) -> Sequence[int]:
    """The same numbers, as uint64 in one block: no object for each is kept."""
    if not indices:
        return ()
    found = array("Q")
    for begin in context.each(range(0, len(indices), INDICES_AT_ONCE)):
        found.extend(indices[begin : begin + INDICES_AT_ONCE])
    return found


def _importance(
    selection: pb.Selection, granularity: Granularity | None, path: str
) -> Magnitude | Random:
    if _chosen(selection, "importance", path) == "random":
        return Random(selection.random.seed)
    if isinstance(granularity, Element):
        return Magnitude()
    magnitude, path = selection.magnitude, f"{path}.magnitude"
    if _chosen(magnitude, "norm", path) == "p":
        if math.isnan(magnitude.p):
            raise InvalidSpec(f"{path}.p", "the order of a norm cannot be NaN")
        return Magnitude(magnitude.p)
    if selection.scope != pb.SCOPE_PER_TENSOR or not isinstance(granularity, Slice):
        raise InvalidSpec(f"{path}.matrix_norm", "is of slices of one tensor only")
    if magnitude.matrix_norm == pb.MATRIX_NORM_FROBENIUS:
        return Magnitude(2.0)
    if magnitude.matrix_norm == pb.MATRIX_NORM_NUCLEAR:
        return Magnitude("nuc")
    raise InvalidSpec(f"{path}.matrix_norm", f"{magnitude.matrix_norm} is no matrix norm")


def _amount(context: RequestContext, selection: pb.Selection, path: str) -> Amount:
    chosen = _chosen(selection, "amount", path)
    if chosen == "fraction":
        return fraction_of(selection.fraction, f"{path}.fraction")
    if chosen == "threshold":
        if math.isnan(selection.threshold):
            raise AmountOutOfRange(f"{path}.threshold", "NaN is no threshold")
        return Threshold(selection.threshold)
    if chosen == "bytes":
        return Budget(selection.bytes)
    if chosen == "macs":
        return _macs(context, selection.macs, f"{path}.macs")
    if chosen == "table":
        return _table(context, selection.table, f"{path}.table.entries")
    return int(selection.count)


def fraction_of(value: float, field: str) -> float:
    """A fraction.  Errors: AmountOutOfRange."""
    if not 0.0 <= value <= 1.0:
        raise AmountOutOfRange(field, f"{value} is not in [0, 1]")
    return value


def _macs(context: RequestContext, macs: pb.Macs, path: str) -> Budget:
    if not macs.target >= 0:
        raise AmountOutOfRange(f"{path}.target", f"{macs.target} is no number of operations")
    for name, cost in context.each(macs.per_unit.items()):
        if not 0 < cost <= MOST_OPERATIONS:
            raise AmountOutOfRange(
                f"{path}.per_unit[{quote(name)}]", f"{cost} is not in (0, {MOST_OPERATIONS:g}]"
            )
    return Budget(macs.target, dict(context.each(macs.per_unit.items())))


def _table(context: RequestContext, table: pb.Table, path: str) -> Table:
    if not table.entries:
        raise InvalidSpec(path, "at least one entry is needed")
    check_length(path, table.entries, MOST_ENTRIES, "entries")
    fractions: dict[str, float] = {}
    for index, entry in enumerate(context.each(table.entries)):
        if entry.tensors in fractions:
            raise InvalidSpec(f"{path}[{index}].tensors", f"{quote(entry.tensors)} is there twice")
        fractions[entry.tensors] = fraction_of(entry.fraction, f"{path}[{index}].fraction")
    return Table(fractions)


def _chosen(message: Message, oneof: str, path: str) -> str:
    chosen: str | None = message.WhichOneof(oneof)
    if chosen is None:
        fields = message.DESCRIPTOR.oneofs_by_name[oneof].fields
        choices = " or ".join(field.name for field in fields)
        raise InvalidSpec(f"{path}.{oneof}", f"{choices} is needed")
    return chosen
