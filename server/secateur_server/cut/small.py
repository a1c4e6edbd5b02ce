"""Prunes many small tensors in batches."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends.batches import (
    are_many,
    batched,
    cut_each,
    side_by_side,
)
from secateur_server.backends.keys import BITS
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import Batch, Stored
from secateur_server.cut.choice import Choice, ChoiceTable, Floats, Ints
from secateur_server.cut.decide import is_plain, units_to_prune
from secateur_server.cut.elements import score_tensor
from secateur_server.cut.score import Ranking, score_dtype
from secateur_server.cut.scored import Masks
from secateur_server.cut.select import select, threshold
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter

# Units of small tensors that are compared.
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
    """Prunes the small tensors of a rule that prunes each tensor separately.

    Args:
        context: The request.
        rule: Resolved.
        state: The parameters.
        extras: Uploaded scores.
        table: Of the rule's tensors. The choices of the small ones are written to it.

    Returns:
        The masks of the small tensors, prior masks included.

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
            ranking = score_tensor(context, rule, name, state, extras)
            candidates = ranking.count_candidates(context)
            count = units_to_prune(rule, (name,), ranking.units, candidates)
            kinds[ranking.dtype].append((ranking, candidates, count))
    masks: Masks = {}
    with context.stage("select"):
        for dtype, alike in kinds.items():
            for part in batched([ranking.units for ranking, _, _ in alike]):
                masks |= _prune(context, rule, alike[part], dtype, table)
    return masks


def _prune(
    context: RequestContext,
    rule: Selection,
    parts: Sequence[tuple[Ranking, int, int]],
    dtype: torch.dtype,
    table: ChoiceTable,
) -> Masks:
    """Prunes a number of units of each ranking, and writes the choices to the table.

    `parts` are rankings that compare as `dtype`, with their candidates, and the units to prune.
    """
    rankings, candidates, counts = zip(*parts, strict=True)
    batch = batch_of(rankings, dtype)
    pruned = np.array(counts, np.int64)
    kept, cuts = cut_each(context, batch, pruned)
    rows = [table.places[ranking.name] for ranking in rankings]
    table.candidates[rows] = candidates
    table.requested[rows] = table.pruned[rows] = pruned
    table.ties_pruned[rows], table.ties[rows] = cuts[:, 1], cuts[:, 2]
    if rule.importance.is_measured:
        table.thresholds[rows] = values_of(cuts[:, 0], dtype)
    return masks_of(rankings, kept)


def batch_of(rankings: Sequence[Ranking], dtype: torch.dtype) -> Batch:
    """Puts small rankings side by side."""
    return side_by_side(
        [ranking.scores for ranking in rankings],
        [ranking.units for ranking in rankings],
        [None if ranking.candidates is None else ranking.candidates.bits for ranking in rankings],
        dtype,
    )


def masks_of(rankings: Sequence[Ranking], kept: Tensor) -> Masks:
    """Splits the kept bits of a batch into the masks of tensors whose units are their elements."""
    sizes = [(ranking.units + 7) // 8 for ranking in rankings]
    begins = list(itertools.accumulate(sizes, initial=0))[:-1]
    counts = np.add.reduceat(_ONES[kept.numpy()], begins, dtype=np.int64).tolist()
    parts = zip(rankings, torch.split(kept, sizes), counts, strict=True)
    return {ranking.name: Mask(bits, ranking.units, n) for ranking, bits, n in parts}


# The number of 1 bits in each byte.
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def are_small(names: Sequence[str], parameters: Mapping[str, Parameter]) -> bool:
    """Whether tensors whose units are compared are many, small, and not too large together."""
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
    """Prunes a number of elements of small tensors, compared by their scores alone.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: The tensors have too few units.
    """
    with context.stage("score"):
        rankings = [
            score_tensor(context, rule, name, state, extras) for name in context.each(names)
        ]
    with context.stage("select"):
        units = sum(ranking.units for ranking in rankings)
        candidates = sum(ranking.count_candidates(context) for ranking in rankings)
        count = units_to_prune(rule, names, units, candidates)
        dtype = score_dtype(rankings)
        batch = batch_of(rankings, dtype)
        # All tensors as one. The padding between them counts as pruned.
        unpadded = Mask(batch.unpruned, batch.bits.numel())
        scores = Stored(batch.bits.view(dtype))
        whole = Ranking("", unpadded.elements, scores, unpadded, rankings[0].device)
        (kept,), cut = select(context, [whole], candidates, count)
        value = threshold(cut, dtype) if rule.importance.is_measured else None
    choice = Choice(tuple(names), candidates, count, count, value, cut.equal, cut.ties)
    return masks_of(rankings, kept.bits), choice


def values_of(keys: Ints, dtype: torch.dtype) -> Floats:
    """Returns the scores that have some keys; NaN for a negative key, which no score has."""
    values = torch.from_numpy(keys).to(BITS[dtype]).view(dtype).to(torch.float64)
    return np.where(keys < 0, np.nan, values.numpy())
