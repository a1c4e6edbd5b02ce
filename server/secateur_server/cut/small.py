"""Many small tensors, each of which is pruned by itself: they are handled together."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends.batches import (
    Batch,
    are_many,
    batched,
    cut_each,
    side_by_side,
)
from secateur_server.backends.keys import BITS, INFINITY
from secateur_server.backends.masks import Mask
from secateur_server.cut.amounts import is_plain, units_to_prune
from secateur_server.cut.choice import Choice, ChoiceTable, Floats, Ints
from secateur_server.cut.score import Ranking, refuse_nan, score_units
from secateur_server.cut.scored import Masks, scores_of
from secateur_server.cut.select import score_dtype, select, threshold
from secateur_server.errors import quote
from secateur_server.granularity.element import Element
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter

# Units of small tensors that are ranked together.
MOST_UNITS = 1 << 22


def is_count_per_tensor(rule: Selection) -> bool:
    """Whether a number of elements of each tensor is pruned, whatever is pruned of others."""
    return rule.has_element_units and rule.scope == "tensor" and is_plain(rule)


def prune_small(
    context: RequestContext,
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
    table: ChoiceTable,
) -> Masks:
    """Prunes the small tensors of a rule of which each is pruned by itself.

    Args:
        context: Of the request.
        rule: Resolved.
        state: The parameters.
        extras: Uploaded scores.
        table: Of the rule's tensors: the choices of the small ones are written to it.

    Returns:
        Their masks, prior pruning in them.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: A tensor has too few units.
    """
    names = [] if rule.normalization else [n for n in table.tensors if state[n].is_small]
    if not are_many(names):
        return {}
    kinds: dict[torch.dtype, list[tuple[Ranking, int, int]]] = defaultdict(list)
    with context.stage("score"):
        for name in context.each(names):
            ranking = ranking_of(context, rule, name, state, extras)
            candidates = ranking.count_candidates(context)
            count = units_to_prune(rule, rule.amount, (name,), ranking.units, candidates)
            kinds[ranking.dtype].append((ranking, candidates, count))
    masks: Masks = {}
    with context.stage("select"):
        for dtype, alike in kinds.items():
            for part in batched([ranking.units for ranking, _, _ in alike]):
                masks |= _prune(context, rule, alike[part], dtype, table)
    return masks


def ranking_of(
    context: RequestContext,
    rule: Selection,
    name: str,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Ranking:
    """The ranking of a tensor whose units are its elements.  Errors: NanScores."""
    parameter = state[name]
    weight, mask, seen = parameter.weight, parameter.mask, parameter.seen
    if rule.scores or rule.scales or not rule.importance.is_value:
        scores, field = scores_of(rule, name, state, extras)
        by = rule.importance, Element()
        return score_units(context, name, parameter, scores, *by, True, False, field)
    if seen is None or seen.largest > INFINITY.get(weight.dtype, 0):
        refuse_nan(context, weight, mask, f"data[{quote(name)}]", seen)
    sample = seen.sample if seen else None
    return Ranking(name, weight.numel(), weight.reshape(-1), mask, weight.device, sample)


def _prune(
    context: RequestContext,
    rule: Selection,
    parts: Sequence[tuple[Ranking, int, int]],
    dtype: torch.dtype,
    table: ChoiceTable,
) -> Masks:
    """Prunes a number of units of each ranking.

    Args:
        context: Of the request.
        rule: The rule.
        parts: Rankings that compare as `dtype`, with how many units are alive, and how many go.
        dtype: As of score_dtype.
        table: Written to.
    """
    rankings, candidates, counts = zip(*parts, strict=True)
    batch = batch_of(rankings, dtype)
    going = np.array(counts, np.int64)
    kept, cuts = cut_each(context, batch, going)
    rows = [table.places[ranking.name] for ranking in rankings]
    table.candidates[rows] = candidates
    table.requested[rows] = table.pruned[rows] = going
    table.ties_pruned[rows], table.ties[rows] = cuts[:, 1], cuts[:, 2]
    if rule.importance.is_measured:
        table.thresholds[rows] = values_of(cuts[:, 0], dtype)
    return masks_of(rankings, kept)


def batch_of(rankings: Sequence[Ranking], dtype: torch.dtype) -> Batch:
    """Small rankings side by side."""
    return side_by_side(
        [ranking.scores for ranking in rankings],
        [ranking.units for ranking in rankings],
        [None if ranking.candidates is None else ranking.candidates.bits for ranking in rankings],
        dtype,
    )


def masks_of(rankings: Sequence[Ranking], kept: Tensor) -> Masks:
    """The masks of tensors whose units are their elements.  kept: bits of what stays of all."""
    sizes = [(ranking.units + 7) // 8 for ranking in rankings]
    begins = list(itertools.accumulate(sizes, initial=0))[:-1]
    counts = np.add.reduceat(_ONES[kept.numpy()], begins, dtype=np.int64).tolist()
    parts = zip(rankings, torch.split(kept, sizes), counts, strict=True)
    return {ranking.name: Mask(bits, ranking.units, n) for ranking, bits, n in parts}


# How many bits of a byte are 1.
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def are_small(names: Sequence[str], parameters: Mapping[str, Parameter]) -> bool:
    """Whether tensors that are ranked together are small: many, but not too many."""
    if not are_many(names):
        return False
    units = sum(parameters[name].weight.numel() for name in names if name in parameters)
    return units <= MOST_UNITS and all(n in parameters and parameters[n].is_small for n in names)


def prune_jointly(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Masks, Choice]:
    """Prunes a number of elements of small tensors by rank alone, whatever tensors they are of.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: The tensors have too few units.
    """
    with context.stage("score"):
        rankings = [ranking_of(context, rule, name, state, extras) for name in context.each(names)]
    with context.stage("select"):
        units = sum(ranking.units for ranking in rankings)
        candidates = sum(ranking.count_candidates(context) for ranking in rankings)
        count = units_to_prune(rule, rule.amount, names, units, candidates)
        dtype = score_dtype(rankings)
        batch = batch_of(rankings, dtype)
        # One tensor of all of them: what lies between them is as if it were pruned already.
        living, scores = Mask(batch.alive, batch.bits.numel()), batch.bits.view(dtype)
        whole = Ranking("", living.elements, scores, living, rankings[0].device)
        (kept,), cut = select(context, [whole], candidates, count)
        value = threshold(cut, dtype) if rule.importance.is_measured else None
    choice = Choice(tuple(names), candidates, count, count, value, cut.equal, cut.ties)
    return masks_of(rankings, kept.bits), choice


def values_of(keys: Ints, dtype: torch.dtype) -> Floats:
    """The scores that have some keys; NaN for a negative one, which is that of no score."""
    values = torch.from_numpy(keys).to(BITS[dtype]).view(dtype).to(torch.float64)
    return np.where(keys < 0, np.nan, values.numpy())
