"""What has units to be ranked: a tensor, or a group of slices of several."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur_server.devices.randomness import RandomScores, random_scores
from secateur_server.errors import quote
from secateur_server.pruning.granularity import NM, Element, Slice
from secateur_server.pruning.groups import alive_units, member_scores, spread_group
from secateur_server.pruning.masks import Mask
from secateur_server.pruning.normalize import combined, normalized
from secateur_server.pruning.score import Ranking, rank, refuse_nan
from secateur_server.pruning.spec import Amount, Group, Magnitude, Parameter, Random, Selection
from secateur_server.runtime.context import RequestContext

Masks = dict[str, Mask]


@dataclass(frozen=True)
class Subject:
    """A tensor, or a group.

    alive: units that are still unpruned.
    spread: the masks of its tensors when only the units of a mask stay, prior pruning not in them.
    costs: for each unit the elements that go with it, and the sum of their squares; None where a
        unit is an element.
    unit_bytes: of a unit; None where they differ.
    sparse_share: what its density is in proportion to, by ERK; 0 of a group.
    """

    name: str
    ranking: Ranking
    alive: int
    spread: Callable[[RequestContext, Mask], Masks]
    costs: Callable[[RequestContext], tuple[Tensor, Tensor]] | None = None
    unit_bytes: int | None = None
    sparse_share: float = 0.0


def together(
    context: RequestContext, rule: Selection, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Which of the rule's tensors, or groups, are ranked together."""
    if rule.scope == "tensor":
        return [(name,) for name in names]
    if rule.scope == "global":
        return [tuple(names)] if names else []
    kinds: dict[str, list[str]] = {}
    # Fang et al. 2024, Isomorphic Pruning: with what has the same structure.
    for name in context.each(names):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [tuple(kind) for kind in kinds.values()]


def subjects_of(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[Subject]:
    """What is ranked together.

    names: of tensors or groups.  parameters: all that the rule reads.  extras: uploaded scores.
    Errors: NanScores, InvalidSpec.
    """
    if rule.groups:
        groups = [rule.groups_by_name[name] for name in names]
        return _normalized_groups(context, rule, groups, parameters, extras)
    subjects = [_tensor(context, rule, name, parameters, extras) for name in context.each(names)]
    if rule.normalization is None or any(
        isinstance(s.ranking.scores, RandomScores) for s in subjects
    ):
        return subjects
    rankings = normalized(context, rule, [subject.ranking for subject in subjects])
    return [replace(s, ranking=r) for s, r in zip(context.each(subjects), rankings, strict=True)]


def _tensor(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Subject:
    granularity, parameter = rule.granularity, parameters[name]
    assert granularity is not None, "the rule has no groups"
    weight, mask = parameter.weight, parameter.mask
    scores, field = _scores(rule, name, parameters, extras)
    # Slices of one tensor rank by their norm, bit for bit as torch has it.
    is_mean = rule.scope != "tensor" or not isinstance(granularity, Slice)
    # The scores of N:M groups take longer than all else, and are not asked for where all groups go.
    is_whole = is_everything(rule.amount) and not rule.guard_rails.rails
    is_all = is_whole and isinstance(granularity, NM) and rule.allocation != "lamp"
    ranking = rank(
        context, name, parameter, scores, rule.importance, granularity, is_mean, is_all, field
    )
    values = scores if scores is not None and scores.shape == weight.shape else weight
    sizes, shape = granularity.sizes(weight.shape), weight.shape
    return Subject(
        name,
        ranking,
        ranking.count_alive(context),
        lambda context, kept: {name: granularity.spread(context, kept, values, mask)},
        None
        if isinstance(granularity, Element)
        else lambda context: granularity.costs(context, weight, values, mask),
        None if sizes is None else sizes * weight.element_size(),
        sum(shape) / weight.numel() if shape else 1.0,
    )


def is_everything(amount: Amount) -> bool:
    """Whether all units go: by the fraction 1.0, where the int 1 is one unit."""
    return isinstance(amount, float) and amount == 1.0


def _scores(
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


def _normalized_groups(
    context: RequestContext,
    rule: Selection,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[Subject]:
    """Groups with the scores of their members normalized, member by member, and combined."""
    alive = [alive_units(context, group, parameters) for group in context.each(groups)]
    scores, floor = _group_scores(context, rule, groups, parameters, extras, alive)
    subjects = []
    for group, of_units, living in zip(context.each(groups), scores, alive, strict=True):
        first = group.members[0]
        device = parameters[first.tensor].weight.device
        ranking = Ranking(group.name, first.units, of_units, living, device, offset=floor)
        unpruned = ranking.count_alive(context)
        spread = partial(spread_group, group=group, parameters=parameters)
        subjects.append(Subject(group.name, ranking, unpruned, spread))
    return subjects


def _group_scores(
    context: RequestContext,
    rule: Selection,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    alive: Sequence[Mask | None],
) -> tuple[Sequence[Tensor | RandomScores], float]:
    if isinstance(rule.importance, Random):
        return [random_scores(rule.importance.seed, g.name) for g in context.each(groups)], 0.0
    members = []
    for group, living in zip(context.each(groups), alive, strict=True):
        if holder := rule.scores.get(group.name):  # in the place of all its members'
            refuse_nan(context, extras[holder], living, f"data[{quote(holder)}]")
            members.append([extras[holder].to(torch.float64).abs()])
        else:
            members.append(_members(context, rule.importance, group, parameters))
    return combined(context, rule, members, alive, [group.name for group in groups])


def _members(
    context: RequestContext,
    importance: Magnitude,
    group: Group,
    parameters: Mapping[str, Parameter],
) -> list[Tensor]:
    """The scores of a group's members that have a say.  Returns: each float64, flat."""
    scores = []
    for member in context.each(group.members):
        if member.is_scored:
            parameter, field = parameters[member.tensor], f"data[{quote(member.tensor)}]"
            refuse_nan(context, parameter.weight, parameter.mask, field, parameter.seen)
            scores.append(member_scores(context, member, parameter, float(importance.p)))
    return scores
