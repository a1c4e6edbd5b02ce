"""Fits rules to the tensors of a state_dict: globs become names, before any data is read."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from secateur_server.backends.dtypes import FP8, PRUNABLE, WIRE_DTYPES
from secateur_server.errors import (
    InvalidMask,
    InvalidScores,
    InvalidSpec,
    quote,
)
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import resolve_group
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import by_tensor, extra_of, first_matches, not_pruned
from secateur_server.spec.row_dims import check_rows, resolve_row_dims
from secateur_server.spec.rules import CustomMasks, GuardRails, Rail, Rule, Selection
from secateur_server.spec.solve import Solve, resolve_solver
from secateur_server.spec.uploads import resolve_uploads, wrong_dtype
from secateur_server.state_dict.catalog import Catalog, Shape, Stored, match, unmatched

# Tensors of all rules. The work of a request grows with their number.
MOST_PRUNED = 300_000


def resolve(context: RequestContext, rules: Sequence[Rule], catalog: Catalog) -> list[Rule]:
    """Replaces the globs of rules by names, and checks that the rules fit the tensors.

    Raises:
        InvalidSpec: A rule does not fit.
    """
    resolved: list[Rule] = []
    pruned = 0
    for rule in context.each(rules):
        found = _RESOLVED[type(rule)](context, rule, catalog)
        pruned += len(found.names())
        if pruned > MOST_PRUNED:
            raise InvalidSpec(
                rule.path,
                f"the rules up to this one prune {pruned} tensors, and a tensor counts once for "
                f"each rule; at most {MOST_PRUNED} in one request: send fewer rules",
            )
        resolved.append(found)
    return resolved


def _resolve_selection(context: RequestContext, rule: Selection, catalog: Catalog) -> Selection:
    if rule.groups:
        rule = _resolve_groups(context, rule, catalog)
        targets = [group.name for group in rule.groups]
        known = {name: name for name in targets}
    else:
        rule = _resolve_tensors(context, rule, catalog)
        targets = list(rule.tensors)
        known = catalog.all_names(targets)
    return replace(
        rule,
        amount=rule.amount.resolve(context, rule.path, targets, known),
        guard_rails=GuardRails(_resolve_rails(context, rule, targets, known)),
    )


def _resolve_groups(context: RequestContext, rule: Selection, catalog: Catalog) -> Selection:
    groups = {
        group.name: resolve_group(context, group, catalog) for group in context.each(rule.groups)
    }
    rule = _resolve_scored(context, rule, groups.values(), catalog)
    targets = _not_excluded(context, rule, list(groups), {name: name for name in groups})
    found = tuple(groups[name] for name in targets)
    shapes = {group.name: [(group.units,)] for group in found}
    _check_scores(context, rule, shapes, catalog)
    names = catalog.in_order({member.tensor for group in found for member in group.members})
    return replace(rule, groups=found, tensors=tuple(names))


def _resolve_scored(
    context: RequestContext, rule: Selection, groups: Iterable[Group], catalog: Catalog
) -> Selection:
    """Finds the uploads for the scored members of groups."""
    scored = {m.tensor: m.path for group in groups for m in group.members if m.is_scored}
    rule = resolve_uploads(context, rule, scored, catalog)
    for name, path in context.each(scored.items()):
        rule.importance.check(path, name, catalog.prunable[name])
    return rule


def _resolve_tensors(context: RequestContext, rule: Selection, catalog: Catalog) -> Selection:
    names = match(context, f"{rule.path}.tensors", rule.tensors, catalog)
    rule = resolve_uploads(context, rule, names, catalog)
    known, field = catalog.all_names(names), f"{rule.path}.row_dims"
    rule = replace(rule, row_dims=resolve_row_dims(context, rule.row_dims, field, known))
    for name in context.each(names):
        _check_units(rule, name, catalog.prunable[name])
    names = _not_excluded(context, rule, names, known)
    known = catalog.all_names(names)
    scales = {name: catalog.name_of(holder) for name, holder in rule.scales.items()}
    rule = replace(
        rule,
        tensors=tuple(names),
        scores=by_tensor(context, rule.scores, f"{rule.path}.importance_scores", known),
        scales=by_tensor(context, scales, f"{rule.path}.scales", known),
    )
    units = _units_of_scored(rule, catalog)
    shapes = {name: [catalog.prunable[name], units[name]] for name in units}
    _check_scores(context, rule, shapes, catalog)
    _check_scales(context, rule, units, catalog)
    return rule


def _not_excluded(
    context: RequestContext, rule: Selection, names: list[str], known: Mapping[str, str]
) -> list[str]:
    """The names without the tensors, or groups, that guard rails exclude."""
    rails, path = rule.guard_rails, f"{rule.path}.guard_rails"
    field = f"{path}.exclude"
    excluded = {
        *(names[:1] if rails.keep_first else ()),
        *(names[-1:] if rails.keep_last else ()),
        *first_matches(context, field, rails.exclude, known, lambda index: f"{field}[{index}]"),
    }
    found = [name for name in names if name not in excluded]
    if not found:
        raise InvalidSpec(path, f"excludes all {len(names)} tensors of the rule; exclude fewer")
    return found


def _resolve_rails(
    context: RequestContext, rule: Selection, names: Sequence[str], known: Mapping[str, str]
) -> tuple[Rail, ...]:
    """The rails, each with the tensors that it is the first to match."""
    rails = rule.guard_rails.rails
    places = [
        (p, i) for p, rail in enumerate(context.each(rails)) for i in range(len(rail.tensors))
    ]
    patterns = [rails[place].tensors[index] for place, index in places]

    def field(index: int) -> str:
        place, index_in_rail = places[index]
        return f"{rails[place].path}.tensors[{index_in_rail}]"

    first = first_matches(context, f"{rule.path}.guard_rails.rails", patterns, known, field)
    of_all = next((place for place, rail in enumerate(rails) if not rail.tensors), len(rails))
    tensors: dict[int, list[str]] = defaultdict(list)
    for name in names:
        named = places[first[name]][0] if name in first else of_all
        tensors[min(named, of_all)].append(name)
    return tuple(
        replace(rail, tensors=tuple(tensors[place]))
        for place, rail in enumerate(context.each(rails))
    )


def _check_units(rule: Selection, name: str, shape: Shape) -> None:
    """Refuses a tensor that does not have units of the rule's granularity."""
    granularity = rule.granularity
    assert granularity is not None, "groups name their tensors"
    granularity.check(rule.path, name, shape)
    if rule.scope == "row":
        dim = rule.row_dims.get(name, 0)
        check_rows(rule.path, name, shape, granularity.grid(shape), dim)
    rule.importance.check(rule.path, name, shape)
    rule.amount.check(rule.path, name, shape, granularity.unit_elements(shape))


def _units_of_scored(rule: Selection, catalog: Catalog) -> dict[str, Shape]:
    """The grid of units of each tensor of the rule that has scores or scales."""
    assert rule.granularity is not None, "groups name their tensors"
    scored = set(rule.tensors) & (rule.scores.keys() | rule.scales.keys())
    return {name: rule.granularity.grid(catalog.prunable[name]) for name in scored}


def _check_scores(
    context: RequestContext,
    rule: Selection,
    shapes: Mapping[str, Sequence[Shape]],
    catalog: Catalog,
) -> None:
    """Refuses scores of another dtype, or of none of the shapes. Errors show the first shape."""
    for name, holder in context.each(rule.scores.items()):
        field = f"{rule.path}.importance_scores[{quote(name)}]"
        if name not in shapes:
            raise not_pruned(field, "group" if rule.groups else "tensor")
        scores = extra_of(field, holder, catalog)
        if scores.dtype not in _SCORE_DTYPES:
            raise InvalidScores(field, wrong_dtype(scores, "floating scores", _SCORE_DTYPES))
        if scores.shape not in shapes[name]:
            raise InvalidScores(field, _wrong_shape(scores, shapes[name][0], "scores"))


def _check_scales(
    context: RequestContext, rule: Selection, units: Mapping[str, Shape], catalog: Catalog
) -> None:
    for name, holder in context.each(rule.scales.items()):
        field = f"{rule.path}.scales[{quote(name)}]"
        if name not in units:
            raise not_pruned(field, "tensor")
        if name in rule.scores:
            raise InvalidScores(
                field, f"{quote(name)} has importance_scores as well; send one or the other"
            )
        if holder not in catalog.prunable:
            raise unmatched(context, field, holder, catalog)
        count, found = math.prod(units[name]), catalog.prunable[holder]
        if found != (count,):
            raise InvalidScores(
                field, f"has shape {list(found)}; it must have a scale for each of {count} units"
            )


def _resolve_masks(context: RequestContext, rule: CustomMasks, catalog: Catalog) -> CustomMasks:
    masks: list[tuple[str, str]] = []
    for given, holder in context.each(rule.masks):
        name, field = catalog.name_of(given), f"{rule.path}.masks[{quote(given)}]"
        if name not in catalog.prunable:
            raise unmatched(context, field, name, catalog)
        mask = extra_of(field, holder, catalog)
        if mask.dtype not in _MASK_DTYPES:
            raise InvalidMask(field, wrong_dtype(mask, "a mask", _MASK_DTYPES))
        shape = catalog.prunable[name]
        is_packed = mask.dtype == torch.uint8 and mask.shape == ((math.prod(shape) + 7) // 8,)
        if mask.shape != shape and not is_packed:
            raise InvalidMask(field, _wrong_shape(mask, shape, "a mask"))
        masks.append((name, holder))
    # Maps do not have an order on the wire.
    places = {name: place for place, name in enumerate(catalog.prunable)}
    return replace(rule, masks=sorted(set(masks), key=lambda of: (places[of[0]], of[1])))


def _wrong_shape(extra: Stored, shape: Shape, what: str) -> str:
    return f"has shape {list(extra.shape)}; {what} must have shape {list(shape)}"


# As CustomMasks in spec.proto lists them.
_MASK_DTYPES = tuple(dtype for dtype in WIRE_DTYPES if dtype not in FP8)
_SCORE_DTYPES = tuple(dtype for dtype in PRUNABLE if dtype.is_floating_point)


# How each kind of rule is resolved.
_RESOLVED: Mapping[type[Rule], Callable[..., Rule]] = {
    Selection: _resolve_selection,
    CustomMasks: _resolve_masks,
    Solve: resolve_solver,
}
