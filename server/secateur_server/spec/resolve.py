"""Fits rules to the tensors of a state_dict: globs become names, before any data is read."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from secateur_server.backends.dtypes import FP8, PRUNABLE, WIRE_DTYPES
from secateur_server.errors import (
    InvalidMask,
    InvalidScores,
    InvalidSpec,
    NotStructured,
    UnknownTensor,
    quote,
)
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import resolve_group
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.matching import by_tensor, first_matches
from secateur_server.spec.rules import (
    CustomMasks,
    GuardRails,
    Rail,
    Rule,
    Selection,
)
from secateur_server.state_dict.catalog import Catalog, Shape, Stored, match, unmatched

# Tensors of all rules. The work of a request grows with their number.
MOST_PRUNED = 300_000


def resolve(context: RequestContext, rules: Sequence[Rule], catalog: Catalog) -> list[Rule]:
    """Replaces the globs of rules by names, and checks that the rules fit the tensors.

    Args:
        context: The request.
        rules: Decoded.
        catalog: Of the state_dict.

    Returns:
        The resolved rules.

    Raises:
        InvalidSpec: A rule does not fit.
    """
    resolved: list[Rule] = []
    pruned = 0
    for rule in context.each(rules):
        found = (
            _resolve_masks(context, rule, catalog)
            if isinstance(rule, CustomMasks)
            else _resolve_selection(context, rule, catalog)
        )
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
        groups = tuple(
            resolve_group(context, group, catalog) for group in context.each(rule.groups)
        )
        every = {group.name: group.name for group in groups}
        targets = _not_excluded(context, rule, list(every), every)
        known = {name: name for name in targets}
        groups = tuple(group for group in groups if group.name in known)
        names = catalog.in_order({m.tensor for group in groups for m in group.members})
        _check_group_scores(context, rule, groups, catalog)
        rule = replace(rule, groups=groups)
    else:
        names = match(context, f"{rule.path}.tensors", rule.tensors, catalog)
        for name in context.each(names):
            _check_units(rule, name, catalog.prunable[name])
        names = targets = _not_excluded(context, rule, names, catalog.all_names(names))
        known = catalog.all_names(names)
        scales = {name: catalog.name_of(holder) for name, holder in rule.scales.items()}
        rule = replace(
            rule,
            scores=by_tensor(context, rule.scores, f"{rule.path}.importance_scores", known),
            scales=by_tensor(context, scales, f"{rule.path}.scales", known),
        )
        _check_scores(context, rule, set(names), catalog)
    return replace(
        rule,
        tensors=tuple(names),
        amount=rule.amount.resolve(context, rule.path, targets, known),
        guard_rails=GuardRails(_resolve_rails(context, rule, targets, known)),
    )


def _not_excluded(
    context: RequestContext, rule: Selection, names: list[str], known: Mapping[str, str]
) -> list[str]:
    """The names without the tensors, or groups, that guard rails exclude."""
    rails, path = rule.guard_rails, f"{rule.path}.guard_rails"
    excluded = {*names[:1]} if rails.keep_first else set()
    excluded |= {*names[-1:]} if rails.keep_last else set()
    field = f"{path}.exclude"
    excluded.update(
        first_matches(context, field, rails.exclude, known, lambda index: f"{field}[{index}]")
    )
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
    if rule.scope == "row" and len(granularity.grid(shape)) < 2:
        raise NotStructured(
            f"{rule.path}.scope",
            f"{quote(name)} has shape {list(shape)}: rows need units in 2 dimensions or more; "
            "use SCOPE_PER_TENSOR",
        )
    rule.importance.check(rule.path, name, shape)
    rule.amount.check(rule.path, name, shape, granularity.unit_elements(shape))


def _check_scores(
    context: RequestContext, rule: Selection, names: Collection[str], catalog: Catalog
) -> None:
    assert rule.granularity is not None, "groups have no scores"
    for name, holder in context.each(rule.scores.items()):
        field = f"{rule.path}.importance_scores[{quote(name)}]"
        if name not in names:
            raise UnknownTensor(field, "the rule does not prune this tensor")
        shape = catalog.prunable[name]
        _check_floating(field, holder, (shape, rule.granularity.grid(shape)), catalog)
    for name, holder in context.each(rule.scales.items()):
        field = f"{rule.path}.scales[{quote(name)}]"
        if name not in names:
            raise UnknownTensor(field, "the rule does not prune this tensor")
        if name in rule.scores:
            raise InvalidScores(
                field, f"{quote(name)} has importance_scores as well; send one or the other"
            )
        if holder not in catalog.prunable:
            raise unmatched(context, field, holder, catalog)
        units = math.prod(rule.granularity.grid(catalog.prunable[name]))
        if catalog.prunable[holder] != (units,):
            found = list(catalog.prunable[holder])
            raise InvalidScores(
                field, f"has shape {found}; it must have a scale for each of {units} units"
            )


def _check_group_scores(
    context: RequestContext, rule: Selection, groups: Sequence[Group], catalog: Catalog
) -> None:
    units = {group.name: group.members[0].units for group in groups}
    for name, holder in context.each(rule.scores.items()):
        field = f"{rule.path}.importance_scores[{quote(name)}]"
        if name not in units:
            raise UnknownTensor(field, "the rule does not have this group")
        _check_floating(field, holder, ((units[name],),), catalog)


def _check_floating(field: str, holder: str, shapes: Sequence[Shape], catalog: Catalog) -> None:
    """Refuses scores of another dtype, or of none of some shapes. Errors show the first shape."""
    scores = _extra(field, holder, catalog)
    if scores.dtype not in _SCORE_DTYPES:
        raise InvalidScores(field, _wrong_dtype(scores, "floating scores", _SCORE_DTYPES))
    if scores.shape not in shapes:
        raise InvalidScores(field, _wrong_shape(scores, shapes[0], "scores"))


def _resolve_masks(context: RequestContext, rule: CustomMasks, catalog: Catalog) -> CustomMasks:
    masks: list[tuple[str, str]] = []
    for given, holder in context.each(rule.masks):
        name, field = catalog.name_of(given), f"{rule.path}.masks[{quote(given)}]"
        if name not in catalog.prunable:
            raise unmatched(context, field, name, catalog)
        mask = _extra(field, holder, catalog)
        if mask.dtype not in _MASK_DTYPES:
            raise InvalidMask(field, _wrong_dtype(mask, "a mask", _MASK_DTYPES))
        shape = catalog.prunable[name]
        is_packed = mask.dtype == torch.uint8 and mask.shape == ((math.prod(shape) + 7) // 8,)
        if mask.shape != shape and not is_packed:
            raise InvalidMask(field, _wrong_shape(mask, shape, "a mask"))
        masks.append((name, holder))
    # Maps do not have an order on the wire.
    places = {name: place for place, name in enumerate(catalog.prunable)}
    return replace(rule, masks=sorted(set(masks), key=lambda of: (places[of[0]], of[1])))


def _extra(field: str, holder: str, catalog: Catalog) -> Stored:
    if holder not in catalog.extras:
        raise UnknownTensor(field, f"the data does not have the tensor {quote(holder)}; send it")
    return catalog.extras[holder]


def _wrong_dtype(extra: Stored, what: str, dtypes: Iterable[torch.dtype]) -> str:
    allowed = ", ".join(WIRE_DTYPES[dtype] for dtype in dtypes)
    return f"has dtype {extra.dtype_name}; {what} may be {allowed}"


def _wrong_shape(extra: Stored, shape: Shape, what: str) -> str:
    return f"has shape {list(extra.shape)}; {what} must have shape {list(shape)}"


# As CustomMasks in spec.proto lists them.
_MASK_DTYPES = tuple(dtype for dtype in WIRE_DTYPES if dtype not in FP8)
_SCORE_DTYPES = tuple(dtype for dtype in PRUNABLE if dtype.is_floating_point)
