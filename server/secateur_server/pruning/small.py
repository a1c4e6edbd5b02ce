"""Many small tensors, each of which is pruned by itself: they are handled together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur_server.devices.batches import SMALL, batched, cut_each, side_by_side
from secateur_server.devices.keys import BITS, INFINITY
from secateur_server.errors import quote
from secateur_server.pruning.amounts import is_plain, number_of
from secateur_server.pruning.choice import ChoiceTable, Floats, Ints
from secateur_server.pruning.granularity import Element
from secateur_server.pruning.masks import Mask
from secateur_server.pruning.score import Ranking, rank, refuse_nan
from secateur_server.pruning.select import score_dtype
from secateur_server.pruning.spec import Parameter, Random, Selection
from secateur_server.pruning.subjects import Masks, scores_of
from secateur_server.runtime.context import RequestContext


def is_each_by_itself(rule: Selection) -> bool:
    """Whether a number of elements of each tensor is pruned, whatever is pruned of others."""
    return isinstance(rule.granularity, Element) and rule.scope == "tensor" and is_plain(rule)


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
    names = [] if rule.normalization else [n for n in table.tensors if is_small(state[n])]
    kinds: dict[torch.dtype, list[tuple[Ranking, int, int]]] = defaultdict(list)
    with context.stage("score"):
        for name in context.each(names):
            ranking = ranking_of(context, rule, name, state, extras)
            alive = ranking.count_alive(context)
            count = number_of(rule, rule.amount, (name,), ranking.units, alive)
            kinds[score_dtype([ranking])].append((ranking, alive, count))
    masks: Masks = {}
    with context.stage("select"):
        for dtype, alike in kinds.items():
            for part in batched([ranking.units for ranking, _, _ in alike]):
                masks |= _prune(context, rule, alike[part], dtype, table)
    return masks


def is_small(parameter: Parameter) -> bool:
    """Whether a tensor is on the CPU and has few elements, but one or more."""
    weight = parameter.weight
    return 0 < weight.numel() <= SMALL and weight.is_cpu


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
    if rule.scores or rule.scales or isinstance(rule.importance, Random):
        scores, field = scores_of(rule, name, state, extras)
        by = rule.importance, Element()
        return rank(context, name, parameter, scores, *by, True, False, field)
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
    rankings, alive, counts = zip(*parts, strict=True)
    batch = side_by_side(
        [ranking.scores for ranking in rankings],
        [ranking.units for ranking in rankings],
        [None if ranking.alive is None else ranking.alive.bits for ranking in rankings],
        dtype,
    )
    going = np.array(counts, np.int64)
    kept, cuts = cut_each(context, batch, going)
    rows = [table.places[ranking.name] for ranking in rankings]
    table.candidates[rows] = alive
    table.requested[rows] = table.pruned[rows] = going
    table.ties_pruned[rows], table.ties[rows] = cuts[:, 1], cuts[:, 2]
    if not isinstance(rule.importance, Random):
        table.thresholds[rows] = values_of(cuts[:, 0], dtype)
    bits = torch.split(kept, [(ranking.units + 7) // 8 for ranking in rankings])
    found = zip(rankings, bits, alive, counts, strict=True)
    return {r.name: Mask.counted(bits, r.units, living - count) for r, bits, living, count in found}


def values_of(keys: Ints, dtype: torch.dtype) -> Floats:
    """The scores that have some keys; NaN for a negative one, which is that of no score."""
    values = torch.from_numpy(keys).to(BITS[dtype]).view(dtype).to(torch.float64)
    return np.where(keys < 0, np.nan, values.numpy())
