"""Predicts the outcome of a rule for many amounts, and scores the units once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import backend_for, spans
from secateur_server.backends.batches import are_many
from secateur_server.backends.masks import Mask
from secateur_server.backends.norms import total
from secateur_server.backends.pieces import PART, Cut, row_sums
from secateur_server.cut.allocation import TABLES
from secateur_server.cut.choice import Choice
from secateur_server.cut.choose import small_at_once
from secateur_server.cut.decide import decide, with_amounts
from secateur_server.cut.energy import energies
from secateur_server.cut.outcomes import choices_of, cuts_of
from secateur_server.cut.plan_small import (
    EachOutcome,
    is_planned_by_runs,
    plan_each,
    plan_jointly,
)
from secateur_server.cut.prune import apply_selection
from secateur_server.cut.removed import ListedOutcome, Outcome, Removed, RemovedTable
from secateur_server.cut.score import score_dtype
from secateur_server.cut.scored import (
    ScoredTensor,
    score_tensors,
    split_by_scope,
)
from secateur_server.cut.small import are_small
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter


def plan(
    context: RequestContext,
    rule: Selection,
    amounts: Sequence[Amount],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    at: str = "",
) -> Sequence[Outcome]:
    """Predicts the outcome of a rule for each of several amounts.

    Args:
        context: The request.
        rule: Resolved.
        amounts: Each takes the place of the rule's amount.
        parameters: As for prune.
        extras: As for prune.
        at: The path of `amounts` in the request, if they are not the rule's own.

    Returns:
        One outcome for each amount.

    Raises:
        InvalidSpec: As prune does.
    """
    rule.importance.check_values(context, extras)
    # Groups overlap, so only masks tell what is kept. Rows have a threshold each. Tables depend on
    # the amount.
    if rule.groups or rule.scope == "row" or rule.allocation in TABLES:
        return [
            _outcome_by_pruning(context, replace(rule, amount=a), parameters, extras)
            for a in context.each(amounts)
        ]
    if is_planned_by_runs(rule, amounts):
        if rule.scope == "tensor":
            return _plan_each(context, rule, amounts, parameters, extras, at)
        planned = _plan_small(context, rule, amounts, parameters, at)
        if planned is not None:
            return planned
    choices: list[list[Choice]] = [[] for _ in amounts]
    removed: list[dict[str, Removed]] = [{} for _ in amounts]
    empty = {name for name in rule.tensors if parameters[name].weight.numel() == 0}
    for name in (name for name in context.each(rule.tensors) if name in empty):
        for index in range(len(amounts)):
            choices[index].append(Choice((name,), 0, 0, 0))
            removed[index][name] = Removed(0, 0.0, 0.0)
    ranked = split_by_scope(context, rule, [name for name in rule.tensors if name not in empty])
    parts = _all_planned(context, rule, amounts, ranked, parameters, extras, at)
    for result in context.each(parts):
        for index, (choice, by_tensor) in enumerate(result):
            choices[index].append(choice)
            removed[index].update(by_tensor)
    return [ListedOutcome(*row) for row in zip(choices, removed, strict=True)]


def _plan_each(
    context: RequestContext,
    rule: Selection,
    amounts: Sequence[Amount],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    at: str,
) -> Sequence[Outcome]:
    """A plan of a rule that prunes each tensor separately. Small tensors are planned in batches."""
    empty = [name for name in rule.tensors if parameters[name].weight.numel() == 0]
    small = [name for name in rule.tensors if parameters[name].is_small]
    small = small if are_many(small) else []
    known = {*empty, *small}
    large = [name for name in rule.tensors if name not in known]
    rules = with_amounts(rule, amounts, at)
    planned = plan_each(context, rules, small, parameters) if small else []
    ranked = split_by_scope(context, rule, large)
    parts = _all_planned(context, rule, amounts, ranked, parameters, extras, at)
    others: list[dict[str, tuple[Choice, Removed]]] = [{} for _ in amounts]
    for name, result in zip(large, parts, strict=True):
        for of_amount, (choice, removed) in zip(others, result, strict=True):
            of_amount[name] = choice, removed[name]
    names = list(dict.fromkeys([*empty, *rule.tensors]))
    places = {name: place for place, name in enumerate(names)}
    return [EachOutcome(index, names, places, planned, row) for index, row in enumerate(others)]


def _plan_small(
    context: RequestContext,
    rule: Selection,
    amounts: Sequence[Amount],
    parameters: Mapping[str, Parameter],
    at: str,
) -> Sequence[Outcome] | None:
    """A plan of a rule that compares small tensors; None if they are not all small."""
    empty = [name for name in rule.tensors if parameters[name].weight.numel() == 0]
    filled = [name for name in rule.tensors if parameters[name].weight.numel()]
    ranked = split_by_scope(context, rule, filled)
    if not all(are_small(names, parameters) for names in ranked):
        return None
    rules = with_amounts(rule, amounts, at)
    parts = [plan_jointly(context, rules, names, parameters) for names in context.each(ranked)]
    names = [*empty, *(name for planned, _ in parts for name in planned.names)]
    places = {name: place for place, name in enumerate(names)}
    none = np.zeros(len(empty))
    whole = np.concatenate([none, *(planned.whole for planned, _ in parts)])
    outcomes: list[Outcome] = []
    for index in range(len(amounts)):
        choices = [Choice((name,), 0, 0, 0) for name in empty]
        choices += [of_part[index] for _, of_part in parts]
        elements = np.concatenate([none.astype(int), *(row.counts[index] for row, _ in parts)])
        energy = np.concatenate([none, *(planned.energy[index] for planned, _ in parts)])
        outcomes.append(ListedOutcome(choices, RemovedTable(places, elements, energy, whole)))
    return outcomes


def _all_planned(
    context: RequestContext,
    rule: Selection,
    amounts: Sequence[Amount],
    ranked: Sequence[tuple[str, ...]],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    at: str,
) -> list[list[tuple[Choice, dict[str, Removed]]]]:
    """Does `_planned` for each set of tensors that are compared."""
    return small_at_once(
        context,
        lambda names: _planned(context, rule, amounts, names, parameters, extras, at),
        ranked,
        lambda names: sum(parameters[name].weight.numel() for name in names),
        parameters[rule.tensors[0]].weight.device,
    )


def _planned(
    context: RequestContext,
    rule: Selection,
    amounts: Sequence[Amount],
    names: tuple[str, ...],
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    at: str,
) -> list[tuple[Choice, dict[str, Removed]]]:
    """For each amount the choice among tensors that are compared, and what is pruned of each."""
    # Scores are needed if any amount prunes less than all units.
    rule = replace(rule, amount=next((a for a in amounts if not a.is_everything), amounts[0]))
    tensors = score_tensors(context, rule, names, parameters, extras)
    dtype = score_dtype([tensor.ranking for tensor in tensors])
    decisions = decide(context, rule, tensors, amounts, at)
    cuts = cuts_of(context, tensors, decisions, dtype)
    removed = [
        removed_of(
            context,
            tensor,
            parameters[tensor.name],
            [decision.counts[i] for decision in decisions],
            [row[i] for row in cuts],
            dtype,
        )
        for i, tensor in enumerate(context.each(tensors))
    ]
    choices = choices_of(context, rule, names, tensors, decisions, cuts, dtype)
    return [
        (choice, {n: row[index] for n, row in zip(names, removed, strict=True)})
        for index, choice in enumerate(choices)
    ]


def removed_of(
    context: RequestContext,
    tensor: ScoredTensor,
    parameter: Parameter,
    counts: Sequence[int],
    cuts: Sequence[Cut],
    dtype: torch.dtype,
) -> list[Removed]:
    """Returns what each of some cuts of a tensor prunes.

    Args:
        context: The request.
        tensor: With its scores.
        parameter: The same tensor.
        counts: Units that each cut prunes.
        cuts: With keys of `dtype`. Sums are rounded in the order of all these cuts.
        dtype: In which the scores are compared.
    """
    driver = tensor.ranking.driver(context)
    if tensor.costs is None:
        result, whole = energies(
            context, driver, tensor.ranking, parameter.weight.reshape(-1), cuts, dtype
        )
        return [Removed(count, energy, whole) for count, energy in zip(counts, result, strict=True)]
    elements, energy = tensor.costs(context)
    whole = _energy(context, parameter.weight, parameter.mask)
    # `energies` adds up squares. The error is far less than one element.
    pruned_elements, _ = energies(
        context, driver, tensor.ranking, elements.to(torch.float64).sqrt_(), cuts, dtype
    )
    pruned_energy, _ = energies(context, driver, tensor.ranking, energy.sqrt_(), cuts, dtype)
    return [
        Removed(round(pruned), energy, whole)
        for pruned, energy in zip(pruned_elements, pruned_energy, strict=True)
    ]


def _outcome_by_pruning(
    context: RequestContext,
    rule: Selection,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Outcome:
    """The outcome of pruning without keeping the masks."""
    masks, choices = apply_selection(context, rule, parameters, extras)
    removed = {}
    for name, mask in context.each(masks.items()):
        parameter = parameters[name]
        whole = _energy(context, parameter.weight, parameter.mask)
        energy = _energy(context, parameter.weight, parameter.mask, mask)
        elements = mask.elements - mask.kept(context) - parameter.count_pruned(context)
        removed[name] = Removed(elements, energy, whole)
    return ListedOutcome(choices, removed)


def _energy(
    context: RequestContext, weight: Tensor, mask: Mask | None, after: Mask | None = None
) -> float:
    """The sum of squares of the elements that `mask` keeps and `after` prunes.

    A mask of None keeps all elements; `after` of None prunes all.
    """
    values, backend = weight.reshape(-1), backend_for(weight.device)

    def energy(span: tuple[int, int]) -> float:
        squares = values[slice(*span)].to(torch.float64).square()
        if mask is not None:
            squares = torch.where(mask.flags(*span), squares, 0.0)
        if after is not None:
            squares = torch.where(after.flags(*span), 0.0, squares)
        return float(row_sums(squares.unsqueeze(0)))

    return total(backend.map(context, energy, spans(len(values), PART)))
