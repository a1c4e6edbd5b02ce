"""Applies a spec, rule by rule. Each rule sees the masks of the rules before it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.cut.allocation import with_table
from secateur_server.cut.choice import Choice, ChoiceTable
from secateur_server.cut.choose import choose, choose_each, small_at_once
from secateur_server.cut.custom_masks import apply_masks
from secateur_server.cut.decide import is_plain
from secateur_server.cut.lamp_small import prune_by_lamp
from secateur_server.cut.plan_small import is_planned_by_runs
from secateur_server.cut.scored import (
    Masks,
    score_groups,
    score_tensors,
    split_by_scope,
)
from secateur_server.cut.small import (
    are_small,
    is_count_per_tensor,
    prune_jointly,
    prune_small,
)
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups_at_once import expand_groups
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import CustomMasks, Rule, Selection
from secateur_server.state_dict.parameter import Parameter


@dataclass(frozen=True)
class KeptUnits:
    """A rule that no request has: prunes units of groups that are decided already.

    Attributes:
        groups: Resolved, with those members that are among the parameters.
        kept: The kept units of each.
    """

    groups: tuple[Group, ...]
    kept: tuple[Mask, ...]


def prune(
    context: RequestContext,
    parameters: Mapping[str, Parameter],
    rules: Sequence[Rule | KeptUnits],
    extras: Mapping[str, Tensor],
) -> tuple[dict[str, Parameter], list[Sequence[Choice]]]:
    """Applies rules in order, with the semantics of torch.nn.utils.prune.PruningContainer.

    Args:
        context: The request.
        parameters: In the order of the state_dict. Not changed.
        rules: Resolved.
        extras: Uploaded scores and masks, by the names of the tensors that hold them.

    Returns:
        The parameters that a rule named, with their new masks, in the same order; and the choices
        of each rule.

    Raises:
        InvalidSpec: A rule does not fit the tensors or their values.
    """
    state = dict(parameters)
    outcomes: list[Sequence[Choice]] = []
    touched: set[str] = set()
    for rule in context.each(rules):
        masks, choices = _APPLIED[type(rule)](context, rule, state, extras)
        for name, mask in masks.items():
            state[name] = Parameter(state[name].weight, mask, state[name].scan)
        touched.update(masks)
        outcomes.append(choices)
    return {name: state[name] for name in parameters if name in touched}, outcomes


def apply_selection(
    context: RequestContext,
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Sequence[Choice]]:
    """Makes the masks of the tensors that a rule names.

    Args:
        context: The request.
        rule: Resolved.
        state: All parameters.
        extras: Uploaded scores.

    Returns:
        The masks, prior masks included, and the rule's choices.

    Raises:
        InvalidSpec: The rule does not fit the tensors or their values.
    """
    rule.importance.check_values(context, extras)
    rule = with_table(context, rule, state, extras)
    # Tensors without elements may have slices, but no choice among them matters.
    empty = dict.fromkeys(name for name in rule.tensors if state[name].weight.numel() == 0)
    names = [group.name for group in rule.groups] or [n for n in rule.tensors if n not in empty]
    device = state[rule.tensors[0]].weight.device
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    masks: Masks = {name: Mask(nothing, 0) for name in empty}
    if is_count_per_tensor(rule):
        table = ChoiceTable.empty([*empty, *names])
        masks |= prune_small(context, rule, state, extras, table)
        names = [name for name in names if name not in masks]
        for found, choice in context.each(_chosen(context, rule, names, state, extras, device)):
            masks |= found
            table.set(choice)
        return masks, table
    choices = [Choice((name,), 0, 0, 0) for name in empty]
    for found, choice in context.each(_chosen(context, rule, names, state, extras, device)):
        for name, mask in found.items():
            masks[name] = masks[name].both(context, mask) if name in masks else mask
        choices.append(choice)
    return masks, choices


def _chosen(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    device: torch.device,
) -> list[tuple[Masks, Choice]]:
    """Masks and choices for each set of tensors, or groups, whose units are compared."""
    if rule.groups:
        return _choose_groups(context, rule, state, extras)
    return small_at_once(
        context,
        lambda names: _choose(context, rule, names, state, extras),
        split_by_scope(context, rule, names),
        lambda names: sum(state[n].weight.numel() for n in names),
        device,
    )


def _choose(
    context: RequestContext,
    rule: Selection,
    names: tuple[str, ...],
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Choice]:
    """Selects among the units of tensors that are compared."""
    if rule.has_element_units and rule.scope != "row" and are_small(names, state):
        if is_plain(rule) and rule.normalization is None:
            return prune_jointly(context, rule, names, state, extras)
        if rule.allocation == "lamp" and is_planned_by_runs(rule, [rule.amount]):
            return prune_by_lamp(context, rule, names, state)
    with context.stage("score"):
        tensors = score_tensors(context, rule, names, state, extras)
    with context.stage("select"):
        kept, choice = choose(context, rule, tensors)
    masks: Masks = {}
    for tensor, units in zip(context.each(tensors), kept, strict=True):
        _add(context, masks, tensor.expand(context, units), state)
    return masks, choice


def _choose_groups(
    context: RequestContext,
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> list[tuple[Masks, Choice]]:
    """Selects among the units of groups; small groups at once."""
    ranked = split_by_scope(context, rule, [group.name for group in rule.groups])
    with context.stage("score"):
        tensors = score_groups(context, rule, ranked, state, extras)
    with context.stage("select"):
        selected = choose_each(context, rule, tensors)
    every = [tensor.name for those in tensors for tensor in those]
    kept = [units for those, _ in selected for units in those]
    groups = [rule.groups_by_name[name] for name in every]
    expanded = iter(expand_groups(context, groups, kept, state))
    chosen = []
    for those, choice in selected:
        masks: Masks = {}
        for _, found in zip(those, expanded, strict=False):
            _add(context, masks, found, state)
        chosen.append((masks, choice))
    return chosen


def _add(
    context: RequestContext, masks: Masks, more: Masks, state: Mapping[str, Parameter]
) -> None:
    """Adds masks of some tensors to `masks`, with prior masks."""
    for name, mask in more.items():
        before = masks.get(name, state[name].mask)
        masks[name] = mask if before is None else mask.both(context, before)


def apply_kept_units(
    context: RequestContext,
    rule: KeptUnits,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Sequence[Choice]]:
    """Makes the masks of the groups' tensors, prior masks included. Makes no choices."""
    masks: Masks = {}
    for found in expand_groups(context, rule.groups, rule.kept, state):
        _add(context, masks, found, state)
    return masks, []


# What each kind of rule does.
_APPLIED: Mapping[type[Rule | KeptUnits], Callable[..., tuple[Masks, Sequence[Choice]]]] = {
    Selection: apply_selection,
    KeptUnits: apply_kept_units,
    CustomMasks: apply_masks,
}
