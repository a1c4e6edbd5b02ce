"""Decodes a spec, and checks all that can be checked without the tensors."""

from array import array
from collections.abc import Sequence
from typing import TypeVar

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import InvalidSpec, quote
from secateur_server.fields import check_length, chosen
from secateur_server.granularity import GRANULARITIES, Granularity
from secateur_server.granularity.group import Group, Member
from secateur_server.importance import IMPORTANCES
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import AMOUNTS
from secateur_server.spec.decode_rails import decode_rails
from secateur_server.spec.rules import (
    Allocation,
    Combination,
    CustomMasks,
    Normalization,
    Rule,
    Scope,
    Selection,
)

Choice = TypeVar("Choice")

SCOPES: dict[int, Scope] = {
    pb.SCOPE_PER_ROW: "row",
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

# As PruningSpec in spec.proto lists them.
MOST_RULES = 10_000
MOST_GROUPS = 20_000
MOST_MEMBERS = 100_000

# Indices that are copied between two checks of the deadline.
INDICES_AT_ONCE = 1 << 16


def decode_spec(context: RequestContext, spec: pb.PruningSpec) -> list[Rule]:
    """Decodes the rules of a spec.

    Raises:
        InvalidSpec: A field is wrong; the error has its path.
    """
    if not spec.rules:
        raise InvalidSpec("spec.rules", "is empty; send at least one rule")
    check_length("spec.rules", spec.rules, MOST_RULES, "rules")
    return [
        _rule(context, rule, f"spec.rules[{index}]")
        for index, rule in enumerate(context.each(spec.rules))
    ]


def _rule(context: RequestContext, rule: pb.Rule, path: str) -> Rule:
    if chosen(rule, "method", path) == "selection":
        return _selection(context, rule.selection, f"{path}.selection")
    path = f"{path}.custom_masks"
    if not rule.custom_masks.masks:
        raise InvalidSpec(f"{path}.masks", "is empty; send at least one mask")
    return CustomMasks(path, list(rule.custom_masks.masks.items()))


def _selection(context: RequestContext, selection: pb.Selection, path: str) -> Selection:
    groups = _groups(context, selection, path)
    if not groups and not selection.tensors:
        raise InvalidSpec(f"{path}.tensors", "is empty; send at least one name or glob")
    granularity = _granularity(selection, path)
    decoded = Selection(
        path=path,
        tensors=tuple(selection.tensors),
        importance=IMPORTANCES[chosen(selection, "importance", path)](selection, granularity, path),
        granularity=granularity,
        scope=_one_of(SCOPES, selection, "scope", path),
        amount=AMOUNTS[chosen(selection, "amount", path)](context, selection, path),
        scores=dict(context.each(selection.importance_scores.items())),
        scales=dict(context.each(selection.scales.items())),
        of_all=selection.of_all,
        groups=groups,
        combination=_one_of(COMBINATIONS, selection, "combination", path),
        normalization=_one_of(NORMALIZATIONS, selection, "normalization", path),
        allocation=_one_of(ALLOCATIONS, selection, "allocation", path),
        guard_rails=decode_rails(context, selection.guard_rails, f"{path}.guard_rails"),
    )
    _check_combination(decoded)
    return decoded


def _check_combination(rule: Selection) -> None:
    """Refuses choices that contradict each other."""
    is_random = not rule.importance.is_measured
    amount, is_share = rule.amount, rule.amount.is_share
    refused = {
        "importance_scores": (
            is_random and rule.scores,
            "cannot be used with random importance; leave them out",
        ),
        "scales": (
            rule.scales and (is_random or rule.groups),
            "cannot be used with random importance or groups; leave them out",
        ),
        "normalization": (
            is_random and rule.normalization,
            "cannot be used with random importance; leave it out",
        ),
        "threshold": (
            is_random and amount.threshold is not None,
            "cannot be used with random importance; use a fraction or a count",
        ),
        "allocation": (
            rule.allocation != "rank" and (not is_share or rule.scope in ("row", "tensor")),
            "needs a fraction or a count, and SCOPE_GLOBAL or SCOPE_ISOMORPHIC",
        ),
        "table": (
            amount.is_per_tensor and rule.scope not in ("row", "tensor"),
            "needs SCOPE_PER_TENSOR or SCOPE_PER_ROW",
        ),
        "scope": (
            rule.scope == "row"
            and (rule.granularity is None or not (is_share or amount.is_per_tensor)),
            "SCOPE_PER_ROW needs a fraction, a count or a table, and cannot be used with groups",
        ),
        "guard_rails.rails": (
            rule.scope == "row" and rule.guard_rails.rails,
            "cannot be used with SCOPE_PER_ROW, which compares units within each row only",
        ),
        "bytes": (
            amount.field == "bytes" and rule.granularity is None,
            "cannot be used with groups, whose units differ in size; use macs",
        ),
        "of_all": (
            rule.of_all and not is_share and not amount.is_per_tensor,
            "needs a fraction, a count or a table",
        ),
    }
    for field, (is_wrong, why) in refused.items():
        if is_wrong:
            raise InvalidSpec(f"{rule.path}.{field}", why)
    if rule.allocation == "erk" and rule.groups:
        raise InvalidSpec(
            f"{rule.path}.allocation", "ERK cannot be used with groups, which have no dimensions"
        )
    if rule.allocation == "lamp" and is_random:
        raise InvalidSpec(
            f"{rule.path}.allocation", "LAMP cannot be used with random importance; use another"
        )


def _one_of(choices: dict[int, Choice], selection: pb.Selection, field: str, path: str) -> Choice:
    value = getattr(selection, field)
    if value not in choices:
        raise InvalidSpec(f"{path}.{field}", f"{value} is not a {field} that this server knows")
    return choices[value]


def _granularity(selection: pb.Selection, path: str) -> Granularity | None:
    """The granularity; None for groups."""
    if selection.granularity == pb.GRANULARITY_GROUP:
        return None
    decode = GRANULARITIES.get(selection.granularity)
    if decode is None:
        raise InvalidSpec(f"{path}.granularity", f"{selection.granularity} is not a granularity")
    return decode(selection, path)


def _groups(context: RequestContext, selection: pb.Selection, path: str) -> tuple[Group, ...]:
    is_grouped = selection.granularity == pb.GRANULARITY_GROUP
    if is_grouped != bool(selection.groups):
        why = "is empty; send at least one group" if is_grouped else "needs GRANULARITY_GROUP"
        raise InvalidSpec(f"{path}.groups", why)
    if is_grouped and selection.tensors:
        raise InvalidSpec(
            f"{path}.tensors", "cannot be used with groups, which name their tensors; leave it out"
        )
    check_length(f"{path}.groups", selection.groups, MOST_GROUPS, "groups")
    members = sum(len(group.members) for group in context.each(selection.groups))
    if members > MOST_MEMBERS:
        raise InvalidSpec(
            f"{path}.groups",
            f"{members} members of all groups are more than {MOST_MEMBERS}; split the rule",
        )
    groups = tuple(
        _group(context, group, index, f"{path}.groups[{index}]")
        for index, group in enumerate(selection.groups)
    )
    names = [group.name for group in groups]
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise InvalidSpec(
                f"{path}.groups[{index}].name", f"two groups are named {quote(name)}; rename one"
            )
        seen.add(name)
    return groups


def _group(context: RequestContext, group: pb.Group, index: int, path: str) -> Group:
    if not group.members:
        raise InvalidSpec(f"{path}.members", "is empty; send at least one member")
    if all(member.unscored for member in context.each(group.members)):
        raise InvalidSpec(f"{path}.members", "all are unscored; at least one must be scored")
    members = tuple(
        _member(context, member, f"{path}.members[{place}]")
        for place, member in enumerate(context.each(group.members))
    )
    return Group(group.name or f"groups[{index}]", members)


def _member(context: RequestContext, member: pb.Member, path: str) -> Member:
    if member.indices and (member.offset or member.stride):
        raise InvalidSpec(
            f"{path}.indices", "cannot be used with offset and stride; send one or the other"
        )
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
    """The same numbers as uint64 in one array, without a Python object for each."""
    if not indices:
        return ()
    found = array("Q")
    for begin in context.each(range(0, len(indices), INDICES_AT_ONCE)):
        found.extend(indices[begin : begin + INDICES_AT_ONCE])
    return found
