"""Chooses units among the tensors that are compared, and says what was chosen."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from secateur_server.backends import backend_for
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Cut
from secateur_server.cut.choice import Choice
from secateur_server.cut.decide import amount_to_prune, decide, is_plain
from secateur_server.cut.decision import Decision
from secateur_server.cut.observe import observe_score
from secateur_server.cut.rows import select_in_rows
from secateur_server.cut.score import Ranked, Ranking, score_dtype
from secateur_server.cut.scored import ScoredTensor
from secateur_server.cut.select import select, threshold
from secateur_server.cut.select_each import select_each
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection

Item = TypeVar("Item")
Done = TypeVar("Done")


def choose(
    context: RequestContext, rule: Selection, tensors: Sequence[ScoredTensor]
) -> tuple[list[Mask], Choice]:
    """Chooses the units that are kept of tensors, or groups, that are compared.

    Args:
        context: The request.
        rule: Resolved.
        tensors: With their scores.

    Returns:
        The kept units of each tensor, and the choice.

    Raises:
        AmountOutOfRange: Guard rails forbid the amount, or there are fewer units.
    """
    if rule.scope == "row":
        (tensor,) = tensors
        units, pruned = select_in_rows(context, rule, tensor.ranking, tensor.grid)
        return [units], Choice((tensor.name,), tensor.candidates, pruned, pruned)
    if is_plain(rule):
        kept, decision = _choose_count(context, rule, tensors)
    else:
        kept, decision = _choose_decided(context, rule, tensors)
    names = tuple(tensor.name for tensor in tensors)
    candidates = sum(tensor.candidates for tensor in tensors)
    pruned = candidates - sum(units.kept(context) for units in kept)
    return kept, choice_of(rule, names, candidates, pruned, decision)


def _choose_count(
    context: RequestContext, rule: Selection, tensors: Sequence[ScoredTensor]
) -> tuple[list[Mask], Decision]:
    """Prunes a number of units by score alone, whatever tensors they are of."""
    count = int(amount_to_prune(rule, tensors))
    candidates = sum(tensor.candidates for tensor in tensors)
    if rule.has_partial_units and count == candidates:  # no unit was scored
        return [_none(tensor.ranking) for tensor in tensors], Decision((), count)
    kept, cut = select(context, [tensor.ranking for tensor in tensors], candidates, count)
    return kept, Decision((), count, (), cut_value(tensors, cut), cut.equal, cut.ties)


def _choose_decided(
    context: RequestContext, rule: Selection, tensors: Sequence[ScoredTensor]
) -> tuple[list[Mask], Decision]:
    """Prunes of each tensor the number of units that is decided for it."""
    (decision,) = decide(context, rule, tensors, [rule.amount])
    parts = small_at_once(
        context,
        lambda part: select(context, [part[0].ranking], part[0].candidates, part[1]),
        list(zip(tensors, decision.counts, strict=True)),
        lambda part: part[0].ranking.units,
        tensors[0].ranking.device,
    )
    if rule.amount.threshold is not None:
        rankings = [tensor.ranking for tensor in tensors]
        at = [threshold(cut, score_dtype([r])) for r, (_, cut) in zip(rankings, parts, strict=True)]
        decision = with_cut(context, decision, rankings, at)
    return [units for (units,), _ in parts], decision


def choose_each(
    context: RequestContext, rule: Selection, ranked: Sequence[Sequence[ScoredTensor]]
) -> list[tuple[list[Mask], Choice]]:
    """Does `choose` for each set of compared tensors; for sets of one tensor, at once."""
    if any(len(tensors) > 1 for tensors in ranked):
        return [choose(context, rule, tensors) for tensors in context.each(ranked)]
    decisions = [_decided(context, rule, tensors) for tensors in context.each(ranked)]
    rankings = [tensor.ranking for (tensor,) in ranked]
    selected = select_each(context, rankings, [decision.counts[0] for decision in decisions])
    found = []
    for tensors, decision, (kept, cut) in zip(
        context.each(ranked), decisions, selected, strict=True
    ):
        (tensor,), (count,) = tensors, decision.counts
        if is_plain(rule):
            value = cut_value(tensors, cut)
            decision = replace(decision, threshold=value, ties=cut.equal, ties_pruned=cut.ties)
        elif rule.amount.threshold is not None:
            at = threshold(cut, score_dtype([tensor.ranking]))
            decision = with_cut(context, decision, [tensor.ranking], [at])
        choice = choice_of(rule, (tensor.name,), tensor.candidates, count, decision)
        found.append(([kept], choice))
    return found


def _decided(context: RequestContext, rule: Selection, tensors: Sequence[ScoredTensor]) -> Decision:
    """How many units are pruned of a tensor that is compared with no other."""
    if is_plain(rule):
        count = int(amount_to_prune(rule, tensors))
        return Decision((count,), count)
    (decision,) = decide(context, rule, tensors, [rule.amount])
    return decision


def _none(ranking: Ranking) -> Mask:
    size = (ranking.units + 7) // 8
    return Mask(backend_for(ranking.device).allocate(size).zero_(), ranking.units)


def cut_value(tensors: Sequence[ScoredTensor], cut: Cut) -> float | None:
    """Returns the score at a cut; None if nothing is pruned."""
    rankings = [tensor.ranking for tensor in tensors]
    value = threshold(cut, score_dtype(rankings))
    return None if value is None else value + rankings[0].offset


def with_cut(
    context: RequestContext,
    decision: Decision,
    rankings: Sequence[Ranked],
    cuts: Sequence[float | None],
) -> Decision:
    """Adds the highest of the tensors' own thresholds to a decision.

    Args:
        context: The request.
        decision: Without a threshold.
        rankings: Of the tensors.
        cuts: The scores at the thresholds; None if nothing is pruned.

    Returns:
        The decision with the threshold and its ties.
    """
    highest = max((cut for cut in cuts if cut is not None), default=None)
    if highest is None:
        return decision
    at = observe_score(context, rankings[0].driver(context), rankings, highest)
    pruned = [min(max(0, c - b), e) for c, (b, e) in zip(decision.counts, at, strict=True)]
    value, ties = highest + rankings[0].offset, sum(equal for _, equal in at)
    return replace(decision, threshold=value, ties=ties, ties_pruned=sum(pruned))


def choice_of(
    rule: Selection, names: tuple[str, ...], candidates: int, pruned: int, decision: Decision
) -> Choice:
    """Makes the reported choice of a decision."""
    value = decision.threshold if rule.importance.is_measured else None
    ties, ties_pruned = decision.ties, decision.ties_pruned
    if rule.has_partial_units and pruned == candidates:  # no group was scored
        value, ties, ties_pruned = None, 0, 0
    requested, bounds = decision.requested, decision.bounds
    return Choice(names, candidates, requested, pruned, value, ties, ties_pruned, bounds)


def small_at_once(
    context: RequestContext,
    work: Callable[[Item], Done],
    items: Sequence[Item],
    elements: Callable[[Item], int],
    device: torch.device,
) -> list[Done]:
    """Calls `work` on each item: small ones in parallel, large ones one by one on all cores.

    Args:
        context: The request.
        work: Makes a result from an item.
        items: To work on.
        elements: Returns the size of an item.
        device: Of the tensors.

    Returns:
        The results in the order of the items.
    """
    backend = backend_for(device)
    is_small = [elements(item) <= backend.piece for item in items]
    small = iter(backend.map(context, work, [i for i, s in zip(items, is_small, strict=True) if s]))
    return [next(small) if s else work(item) for item, s in zip(items, is_small, strict=True)]
