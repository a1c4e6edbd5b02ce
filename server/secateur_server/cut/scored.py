"""Tensors and groups with the scores of their units."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Scores, Stored
from secateur_server.cut.elements import replacement, score_parameter, score_rows, with_products
from secateur_server.cut.normalize import combined, normalized
from secateur_server.cut.score import Ranked, Ranking, refuse_nan
from secateur_server.errors import quote
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import expand_group
from secateur_server.granularity.groups_at_once import candidates_of, score_members
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter

Masks = dict[str, Mask]


class RankedTensor(Protocol):
    """A tensor, or a group, whose scores are in this process or elsewhere."""

    @property
    def name(self) -> str:
        """Of the tensor or group."""

    @property
    def ranking(self) -> Ranked:
        """The scores."""

    @property
    def candidates(self) -> int:
        """How many units are still unpruned."""

    @property
    def unit_bytes(self) -> int | None:
        """Bytes of a unit; None if units differ."""

    @property
    def sparse_share(self) -> float:
        """By ERK, the density is in proportion to this; 0 for a group."""


@dataclass(frozen=True)
class ScoredTensor:
    """A tensor, or a group of slices of several tensors, with the scores of its units.

    Attributes:
        name: Of the tensor or group.
        ranking: The scores.
        candidates: How many units are still unpruned.
        expand: Makes the masks of its tensors from a mask of kept units. Prior masks are not
            included.
        costs: Returns for each unit the elements that are pruned with it, and the sum of their
            squares. None if units are elements.
        unit_bytes: Bytes of a unit; None if units differ.
        grid: The shape of the units; empty for a group.
        sparse_share: By ERK, the density is in proportion to this; 0 for a group.
    """

    name: str
    ranking: Ranking
    candidates: int
    expand: Callable[[RequestContext, Mask], Masks]
    costs: Callable[[RequestContext], tuple[Tensor, Tensor]] | None = None
    unit_bytes: int | None = None
    grid: tuple[int, ...] = ()
    sparse_share: float = 0.0


def split_by_scope(
    context: RequestContext, rule: Selection, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Splits the tensors, or groups, of a rule into the sets whose units are compared."""
    if rule.scope in ("row", "tensor"):
        return [(name,) for name in names]
    if rule.scope == "global":
        return [tuple(names)] if names else []
    kinds: dict[str, list[str]] = {}
    # Fang et al. 2024, Isomorphic Pruning: tensors of the same structure are compared.
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
    """Scores the units of tensors, or groups, that are compared.

    Args:
        context: The request.
        rule: Resolved.
        names: Of the tensors or groups.
        parameters: All that the rule reads.
        extras: Uploaded scores.

    Returns:
        The scored tensors, in the order of `names`.

    Raises:
        NanScores: A score is NaN.
        InvalidSpec: The scores cannot be normalized.
    """
    if rule.groups:
        (groups,) = score_groups(context, rule, [names], parameters, extras)
        return groups
    tensors = [
        _scored_tensor(context, rule, name, parameters, extras) for name in context.each(names)
    ]
    if rule.normalization is None or any(tensor.ranking.is_random for tensor in tensors):
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
    granularity, (weight, mask, _) = rule.granularity, parameters[name]
    assert granularity is not None, "the rule has no groups"
    scores, _ = replacement(rule, name, parameters, extras)
    values = scores if scores is not None and scores.shape == weight.shape else weight
    ranking = score_rows(context, rule, name, parameters, extras)
    if ranking is None:
        parameter = with_products(context, rule, name, parameters, extras)
        values = parameter.weight if values is weight else values
        ranking = score_parameter(context, rule, name, parameter, parameters, extras)
    if granularity.is_part:
        values = rule.importance.elements(context, name, values)
    sizes, shape = granularity.unit_elements(weight.shape), weight.shape
    return ScoredTensor(
        name,
        ranking,
        ranking.count_candidates(context),
        lambda context, kept: {name: granularity.expand(context, kept, values, mask)},
        None
        if granularity.is_element
        else lambda context: granularity.costs(context, weight, values, mask),
        None if sizes is None else sizes * weight.element_size(),
        granularity.grid(shape),
        sum(shape) / weight.numel() if shape else 1.0,
    )


def score_groups(
    context: RequestContext,
    rule: Selection,
    ranked: Sequence[Sequence[str]],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[list[ScoredTensor]]:
    """Scores all groups of a rule; small groups are scored at once.

    Args:
        context: The request.
        rule: Resolved.
        ranked: Sets of names. The groups of a set are compared, and normalized jointly.
        parameters: All that the rule reads.
        extras: Uploaded scores.

    Returns:
        The scored groups of each set.

    Raises:
        NanScores: A score is NaN.
        InvalidSpec: The scores cannot be normalized.
    """
    groups = [rule.groups_by_name[name] for names in ranked for name in names]
    candidates = candidates_of(context, groups, parameters)
    members = (
        []
        if are_random(rule)
        else _member_scores(context, rule, groups, parameters, extras, candidates)
    )
    devices = [parameters[group.members[0].tensor].weight.device for group in groups]
    rankings = rank_groups(context, rule, ranked, candidates, members, devices)
    scored = (
        ScoredTensor(
            group.name,
            ranking,
            ranking.count_candidates(context),
            partial(expand_group, group=group, parameters=parameters),
        )
        for group, ranking in zip(groups, rankings, strict=True)
    )
    return [[next(scored) for _ in context.each(names)] for names in ranked]


def are_random(rule: Selection) -> bool:
    """Whether groups have scores that depend on no weight."""
    return all(rule.importance.by_name(group.name) for group in rule.groups)


def rank_groups(
    context: RequestContext,
    rule: Selection,
    ranked: Sequence[Sequence[str]],
    candidates: Sequence[Mask | None],
    members: Sequence[Sequence[Tensor]],
    devices: Sequence[torch.device],
) -> list[Ranking]:
    """Combines the scores of the members of groups.

    Args:
        context: The request.
        rule: Resolved.
        ranked: As of score_groups.
        candidates: Of each group, as candidates_of returns them.
        members: The scores of the scored members of each group: float64, flat; not used if they
            are random.
        devices: Of the scores of each group.

    Raises:
        InvalidSpec: The scores cannot be normalized.
    """
    names = [name for of_set in ranked for name in of_set]
    scores: list[tuple[Scores, float]]
    by_name = [rule.importance.by_name(name) for name in context.each(names)]
    if all(by_name):
        scores = [(random, 0.0) for random in by_name if random]
    else:
        sizes = list(map(len, ranked))
        found = combined(context, rule, members, candidates, names, sizes)
        scores = [(Stored(values), floor) for values, floor in found]
    return [
        Ranking(name, rule.groups_by_name[name].units, values, mask, device, offset=floor)
        for name, (values, floor), mask, device in zip(
            names, scores, candidates, devices, strict=True
        )
    ]


def _member_scores(
    context: RequestContext,
    rule: Selection,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    candidates: Sequence[Mask | None],
) -> list[list[Tensor]]:
    """The scores of the scored members of each group: float64, flat."""
    for group, mask in zip(context.each(groups), candidates, strict=True):
        if holder := rule.scores.get(group.name):  # these replace the scores of all members
            refuse_nan(context, extras[holder], mask, f"data[{quote(holder)}]")
    own = [group for group in groups if group.name not in rule.scores]
    scored = (member.tensor for group in own for member in group.members if member.is_scored)
    own_parameters = dict(parameters)
    for name in context.each(dict.fromkeys(scored)):
        parameter, field = parameters[name], f"data[{quote(name)}]"
        refuse_nan(context, parameter.weight, parameter.mask, field, parameter.scan)
        own_parameters[name] = with_products(context, rule, name, parameters, extras)
    order = rule.importance.order
    assert order is not None, "the spec is refused otherwise"
    members = iter(score_members(context, own, own_parameters, order))
    return [
        [extras[rule.scores[group.name]].to(torch.float64).abs()]
        if group.name in rule.scores
        else next(members)
        for group in groups
    ]
