"""What has units to be ranked: a tensor, or a group of slices of several."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores
from secateur_server.cut.normalize import combined, normalized
from secateur_server.cut.score import Ranking, refuse_nan, score_units
from secateur_server.errors import quote
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import expand_group
from secateur_server.granularity.groups_at_once import candidates_of, score_members
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Amount, Selection
from secateur_server.state_dict.parameter import Parameter

Masks = dict[str, Mask]


@dataclass(frozen=True)
class ScoredTensor:
    """A tensor, or a group.

    alive: units that are still unpruned.
    expand: the masks of its tensors when only the units of a mask stay, prior pruning not in them.
    costs: for each unit the elements that go with it, and the sum of their squares; None where a
        unit is an element.
    unit_bytes: of a unit; None where they differ.
    rows: of the grid of its units; 0 of a group.
    sparse_share: what its density is in proportion to, by ERK; 0 of a group.
    """

    name: str
    ranking: Ranking
    candidates: int
    expand: Callable[[RequestContext, Mask], Masks]
    costs: Callable[[RequestContext], tuple[Tensor, Tensor]] | None = None
    unit_bytes: int | None = None
    rows: int = 0
    sparse_share: float = 0.0


def split_by_scope(
    context: RequestContext, rule: Selection, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Which of the rule's tensors, or groups, are ranked together."""
    if rule.scope in ("row", "tensor"):
        return [(name,) for name in names]
    if rule.scope == "global":
        return [tuple(names)] if names else []
    kinds: dict[str, list[str]] = {}
    # Fang et al. 2024, Isomorphic Pruning: with what has the same structure.
    for name in context.each(names):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [tuple(kind) for kind in kinds.values()]


def score_tensors(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[ScoredTensor]:
    """What is ranked together.

    names: of tensors or groups.  parameters: all that the rule reads.  extras: uploaded scores.
    Errors: NanScores, InvalidSpec.
    """
    if rule.groups:
        (of_groups,) = score_groups(context, rule, [names], parameters, extras)
        return of_groups
    tensors = [
        _scored_tensor(context, rule, name, parameters, extras) for name in context.each(names)
    ]
    if rule.normalization is None or any(
        isinstance(s.ranking.scores, RandomScores) for s in tensors
    ):
        return tensors
    rankings = normalized(context, rule, [tensor.ranking for tensor in tensors])
    return [replace(s, ranking=r) for s, r in zip(context.each(tensors), rankings, strict=True)]


def _scored_tensor(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> ScoredTensor:
    granularity, parameter = rule.granularity, parameters[name]
    assert granularity is not None, "the rule has no groups"
    weight, mask = parameter.weight, parameter.mask
    scores, field = scores_of(rule, name, parameters, extras)
    # Slices of one tensor rank by their norm, bit for bit as torch has it.
    is_mean = rule.scope != "tensor" or not granularity.is_normed
    # The scores of N:M groups take longer than all else, and are not asked for where all groups go.
    is_whole = is_everything(rule.amount) and not rule.guard_rails.rails
    is_all = is_whole and granularity.is_part and rule.allocation != "lamp"
    ranking = score_units(
        context, name, parameter, scores, rule.importance, granularity, is_mean, is_all, field
    )
    values = scores if scores is not None and scores.shape == weight.shape else weight
    sizes, shape = granularity.unit_elements(weight.shape), weight.shape
    grid = granularity.grid(shape)
    return ScoredTensor(
        name,
        ranking,
        ranking.count_candidates(context),
        lambda context, kept: {name: granularity.expand(context, kept, values, mask)},
        None
        if granularity.is_element
        else lambda context: granularity.costs(context, weight, values, mask),
        None if sizes is None else sizes * weight.element_size(),
        grid[0] if grid else 1,
        sum(shape) / weight.numel() if shape else 1.0,
    )


def is_everything(amount: Amount) -> bool:
    """Whether all units go: by the fraction 1.0, where the int 1 is one unit."""
    return isinstance(amount, float) and amount == 1.0


def scores_of(
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Tensor | None, str]:
    """What ranks in a weight's place, and what errors call that which ranks."""
    if name in rule.scores:
        return extras[rule.scores[name]], f"data[{quote(rule.scores[name])}]"
    if name in rule.scales:
        return parameters[rule.scales[name]].weight, f"data[{quote(rule.scales[name])}]"
    return None, f"data[{quote(name)}]"


def score_groups(
    context: RequestContext,
    rule: Selection,
    ranked: Sequence[Sequence[str]],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[list[ScoredTensor]]:
    """As subjects_of, of all groups of a rule: the small ones at once.

    ranked: the names that are ranked together; scores are normalized among these.
    """
    groups = [rule.groups_by_name[name] for names in ranked for name in names]
    candidates = candidates_of(context, groups, parameters)
    scores: list[tuple[Tensor | RandomScores, float]]
    by_name = [rule.importance.by_name(group.name) for group in context.each(groups)]
    if all(by_name):
        scores = [(of_group, 0.0) for of_group in by_name if of_group]
    else:
        members = _member_scores(context, rule, groups, parameters, extras, candidates)
        names, sizes = [group.name for group in groups], list(map(len, ranked))
        scores = [*combined(context, rule, members, candidates, names, sizes)]
    tensors = (
        _scored_group(context, group, unit_scores, living, floor, parameters)
        for group, (unit_scores, floor), living in zip(groups, scores, candidates, strict=True)
    )
    return [[next(tensors) for _ in context.each(names)] for names in ranked]


def _scored_group(
    context: RequestContext,
    group: Group,
    scores: Tensor | RandomScores,
    candidates: Mask | None,
    floor: float,
    parameters: Mapping[str, Parameter],
) -> ScoredTensor:
    first = group.members[0]
    device = parameters[first.tensor].weight.device
    ranking = Ranking(group.name, first.units, scores, candidates, device, offset=floor)
    expand = partial(expand_group, group=group, parameters=parameters)
    return ScoredTensor(group.name, ranking, ranking.count_candidates(context), expand)


def _member_scores(
    context: RequestContext,
    rule: Selection,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    candidates: Sequence[Mask | None],
) -> list[list[Tensor]]:
    """The scores of those of each group's members that are scored: each float64, flat."""
    for group, living in zip(context.each(groups), candidates, strict=True):
        if holder := rule.scores.get(group.name):  # in the place of all its members'
            refuse_nan(context, extras[holder], living, f"data[{quote(holder)}]")
    own = [group for group in groups if group.name not in rule.scores]
    scored = (member.tensor for group in own for member in group.members if member.is_scored)
    for name in context.each(dict.fromkeys(scored)):
        parameter, field = parameters[name], f"data[{quote(name)}]"
        refuse_nan(context, parameter.weight, parameter.mask, field, parameter.seen)
    of_members = iter(score_members(context, own, parameters, rule.importance.order))
    return [
        [extras[rule.scores[group.name]].to(torch.float64).abs()]
        if group.name in rule.scores
        else next(of_members)
        for group in groups
    ]
