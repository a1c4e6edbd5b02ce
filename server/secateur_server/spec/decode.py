"""Decodes a spec, and checks all that can be checked without the tensors."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor

from secateur_proto import spec_pb2 as pb
from secateur_proto.enums import values_by_name
from secateur_server.errors import InvalidSpec, quote
from secateur_server.fields import check_length, chosen
from secateur_server.granularity import GRANULARITIES, Granularity
from secateur_server.granularity.group import Group, Member
from secateur_server.importance import IMPORTANCES
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import AMOUNTS
from secateur_server.spec.decode_rails import decode_rails
from secateur_server.spec.row_dims import decode_row_dims
from secateur_server.spec.rules import (
    Allocation,
    Combination,
    CustomMasks,
    Normalization,
    Rule,
    Scope,
    Selection,
)
from secateur_server.spec.solve import Solve, decode_solver

Choice = TypeVar("Choice")


def _by_number(enum: EnumDescriptor) -> dict[int, Any]:
    return {n: name.removeprefix("per_") for name, n in values_by_name(enum).items()}


# The values of enums as `rules` spells them. 0 is a value that the caller did not set.
SCOPES: dict[int, Scope] = _by_number(pb.Scope.DESCRIPTOR)
ALLOCATIONS: dict[int, Allocation] = {0: "rank", **_by_number(pb.Allocation.DESCRIPTOR)}
COMBINATIONS: dict[int, Combination] = {0: "mean", **_by_number(pb.Combination.DESCRIPTOR)}
NORMALIZATIONS: dict[int, Normalization | None] = {
    **_by_number(pb.Normalization.DESCRIPTOR),
    **dict.fromkeys((pb.NORMALIZATION_UNSPECIFIED, pb.NORMALIZATION_NONE)),
}

# As PruningSpec in spec.proto lists them.
MOST_RULES = 10_000
MOST_GROUPS = 20_000
MOST_MEMBERS = 100_000
MOST_ALIGN = 4096

# Indices that are copied between two checks of the deadline.
INDICES_AT_ONCE = 1 << 16


def decode_spec(
    context: RequestContext, spec: pb.PruningSpec, default_align: int = 1
) -> list[Rule]:
    """Decodes the rules of a spec.

    Args:
        context: The request.
        spec: The spec.
        default_align: Selection.align of rules that do not say it.

    Raises:
        InvalidSpec: A field is wrong; the error has its path.
    """
    if not spec.rules:
        raise InvalidSpec("spec.rules", "is empty; send at least one rule")
    check_length("spec.rules", spec.rules, MOST_RULES, "rules")
    rules = [
        _rule(context, rule, f"spec.rules[{index}]", default_align)
        for index, rule in enumerate(context.each(spec.rules))
    ]
    for index, (rule, following) in enumerate(itertools.pairwise(rules)):
        if isinstance(rule, Solve) and not isinstance(following, Solve):
            raise InvalidSpec(f"spec.rules[{index}].solver", "must follow all rules of other kinds")
    return rules


def _rule(context: RequestContext, rule: pb.Rule, path: str, default_align: int) -> Rule:
    method = chosen(rule, "method", path)
    if method == "selection":
        return _selection(context, rule.selection, f"{path}.selection", default_align)
    if method == "solver":
        return decode_solver(context, rule.solver, f"{path}.solver")
    path = f"{path}.custom_masks"
    if not rule.custom_masks.masks:
        raise InvalidSpec(f"{path}.masks", "is empty; send at least one mask")
    return CustomMasks(path, list(rule.custom_masks.masks.items()))


def _selection(
    context: RequestContext, selection: pb.Selection, path: str, default_align: int
) -> Selection:
    _check_granularity(selection, path)
    groups = decode_groups(context, selection.groups, f"{path}.groups")
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
        row_dims=decode_row_dims(context, selection.row_dims, f"{path}.row_dims"),
        align=(selection.align or default_align) if groups else 1,
    )
    if selection.align > MOST_ALIGN or (selection.align > 1 and not groups):
        raise InvalidSpec(
            f"{path}.align", f"{selection.align}: needs groups, and is {MOST_ALIGN} at most"
        )
    for field, why in _contradictions(decoded):
        raise InvalidSpec(f"{path}.{field}", why)
    return decoded


def _contradictions(rule: Selection) -> Iterator[tuple[str, str]]:
    """The fields that contradict other choices, each with the reason."""
    if not rule.importance.is_measured:
        yield from _contradictions_of_random(rule)
    if rule.importance.uploads:
        yield from _contradictions_of_activation(rule)
    if rule.groups:
        yield from _contradictions_of_groups(rule)
    amount, is_compared = rule.amount, rule.scope in ("global", "isomorphic")
    has_share = amount.is_share or amount.is_per_tensor
    if rule.allocation == "owl":
        yield from _contradictions_of_owl(rule)
    elif rule.allocation != "rank" and not (amount.is_share and is_compared):
        yield "allocation", "needs a fraction or a count, and SCOPE_GLOBAL or SCOPE_ISOMORPHIC"
    if amount.is_per_tensor and is_compared:
        yield "table", "needs SCOPE_PER_TENSOR or SCOPE_PER_ROW"
    if rule.scope == "row" and not has_share:
        yield "scope", "SCOPE_PER_ROW needs a fraction, a count or a table"
    if rule.scope == "row" and rule.guard_rails.rails:
        why = "cannot be used with SCOPE_PER_ROW, which compares units within each row only"
        yield "guard_rails.rails", why
    if rule.row_dims and rule.scope != "row":
        yield "row_dims", "needs SCOPE_PER_ROW; leave it out"
    if rule.of_all and not has_share:
        yield "of_all", "needs a fraction, a count or a table"


def _contradictions_of_random(rule: Selection) -> Iterator[tuple[str, str]]:
    if rule.scores:
        yield "importance_scores", "cannot be used with random importance; leave them out"
    if rule.scales:
        yield "scales", "cannot be used with random importance; leave them out"
    if rule.normalization:
        yield "normalization", "cannot be used with random importance; leave it out"
    if rule.amount.threshold is not None:
        yield "threshold", "cannot be used with random importance; use a fraction or a count"
    if rule.allocation in ("lamp", "owl"):
        name = rule.allocation.upper()
        yield "allocation", f"{name} cannot be used with random importance; use another"


def _contradictions_of_activation(rule: Selection) -> Iterator[tuple[str, str]]:
    for field in ("importance_scores", "scales"):
        if rule.scores if field == "importance_scores" else rule.scales:
            yield field, "cannot be used with activation, which has factors; leave them out"


def _contradictions_of_owl(rule: Selection) -> Iterator[tuple[str, str]]:
    if not rule.has_element_units:
        yield "allocation", "OWL needs GRANULARITY_ELEMENT; use another allocation"
    if rule.scope not in ("row", "tensor"):
        yield "allocation", "OWL needs SCOPE_PER_ROW or SCOPE_PER_TENSOR"
    if rule.amount.field != "fraction":
        yield "allocation", "OWL needs a fraction"


def _contradictions_of_groups(rule: Selection) -> Iterator[tuple[str, str]]:
    if rule.importance.is_measured and rule.importance.order is None:
        yield "granularity", "GRANULARITY_GROUP needs magnitude or random importance; use one"
    if rule.scales:
        yield "scales", "cannot be used with groups; leave them out"
    if rule.scope == "row":
        yield "scope", "SCOPE_PER_ROW cannot be used with groups; use another scope"
    if rule.amount.field == "bytes":
        yield "bytes", "cannot be used with groups, whose units differ in size; use macs"
    if rule.allocation == "erk":
        yield "allocation", "ERK cannot be used with groups, which have no dimensions"


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


def decode_groups(
    context: RequestContext, messages: Sequence[pb.Group], path: str
) -> tuple[Group, ...]:
    """Decodes groups.

    Args:
        context: The request.
        messages: The groups.
        path: Of the messages in the request.

    Raises:
        InvalidSpec: A field is wrong.
    """
    check_length(path, messages, MOST_GROUPS, "groups")
    members = sum(len(group.members) for group in context.each(messages))
    if members > MOST_MEMBERS:
        raise InvalidSpec(
            path, f"{members} members of all groups are more than {MOST_MEMBERS}; split the rule"
        )
    groups: dict[str, Group] = {}
    for index, message in enumerate(messages):
        at, name = f"{path}[{index}]", message.name or f"groups[{index}]"
        if name in groups:
            raise InvalidSpec(f"{at}.name", f"two groups are named {quote(name)}; rename one")
        groups[name] = _group(context, name, message, at)
    return tuple(groups.values())


def _check_granularity(selection: pb.Selection, path: str) -> None:
    is_grouped = selection.granularity == pb.GRANULARITY_GROUP
    if is_grouped != bool(selection.groups):
        why = "is empty; send at least one group" if is_grouped else "needs GRANULARITY_GROUP"
        raise InvalidSpec(f"{path}.groups", why)
    if is_grouped and selection.tensors:
        raise InvalidSpec(
            f"{path}.tensors", "cannot be used with groups, which name their tensors; leave it out"
        )


def _group(context: RequestContext, name: str, group: pb.Group, path: str) -> Group:
    if not group.members:
        raise InvalidSpec(f"{path}.members", "is empty; send at least one member")
    if all(member.unscored or member.unmasked for member in context.each(group.members)):
        raise InvalidSpec(
            f"{path}.members", "all are unscored or unmasked; at least one must be scored"
        )
    members = [
        _member(context, member, f"{path}.members[{place}]")
        for place, member in enumerate(context.each(group.members))
    ]
    masked = tuple(member for member in members if member.is_masked)
    return Group(name, masked, tuple(member for member in members if not member.is_masked))


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
        is_scored=not (member.unscored or member.unmasked),
        is_masked=not member.unmasked,
    )


def _indices(context: RequestContext, indices: Sequence[int]) -> Sequence[int]:
    """The same numbers as uint64 in one array, without a Python object for each."""
    if not indices:
        return ()
    found = array("Q")
    for begin in context.each(range(0, len(indices), INDICES_AT_ONCE)):
        found.extend(indices[begin : begin + INDICES_AT_ONCE])
    return found
