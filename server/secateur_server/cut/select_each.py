"""Selects within many small rankings, each separately; those of one length are sorted at once."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from secateur_server.backends import spans
from secateur_server.backends.keys import BITS, as_keys
from secateur_server.backends.masks import Mask, flags_of, masks_of
from secateur_server.backends.pieces import Cut
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import NO_CUT, select
from secateur_server.runtime.context import RequestContext

# Units that are sorted at once. Their keys fit in the second-level cache.
AT_ONCE = 1 << 17


def select_each(
    context: RequestContext, rankings: Sequence[Ranking], counts: Sequence[int]
) -> list[tuple[Mask, Cut]]:
    """Prunes units of each ranking separately, as `select` does.

    Args:
        context: The request.
        rankings: On one device.
        counts: Units to prune of each; at most its candidates.

    Returns:
        The candidates of each ranking that are kept, and its cut.
    """
    alike: dict[tuple[int, int, torch.dtype, bool], list[int]] = defaultdict(list)
    done: dict[int, tuple[Mask, Cut]] = {}
    for place, (ranking, count) in enumerate(zip(context.each(rankings), counts, strict=True)):
        if not ranking.is_random and 0 < ranking.units <= AT_ONCE:
            kind = ranking.units, count, ranking.dtype, ranking.candidates is None
            alike[kind].append(place)
        else:
            (kept,), cut = select(context, [ranking], ranking.count_candidates(context), count)
            done[place] = kept, cut
    for (units, count, dtype, _), places in alike.items():
        for begin, end in context.each(spans(len(places), AT_ONCE // units)):
            some = [rankings[place] for place in places[begin:end]]
            done |= zip(places[begin:end], _select_alike(some, count, dtype), strict=True)
    return [done[place] for place in range(len(rankings))]


def _select_alike(
    rankings: Sequence[Ranking], count: int, dtype: torch.dtype
) -> list[tuple[Mask, Cut]]:
    """Does `select_each` for rankings of one length, which all have masks or all have none."""
    keys = as_keys(torch.stack([ranking.values for ranking in rankings]), dtype)
    candidates = [ranking.candidates for ranking in rankings if ranking.candidates is not None]
    kept = flags_of(candidates) if candidates else torch.ones_like(keys, dtype=torch.bool)
    if count == 0:
        return [(mask, NO_CUT) for mask in masks_of(kept)]
    keys.masked_fill_(~kept, torch.iinfo(BITS[dtype]).max)
    ascending, order = keys.sort(dim=1, stable=True)  # stable: ties go to the lowest index
    kept = kept.scatter(1, order[:, :count], False)
    at = ascending[:, count - 1 : count]
    below, equal = (keys < at).sum(1).tolist(), (keys == at).sum(1).tolist()
    cuts = [
        Cut(key, count - b, e) for key, b, e in zip(at[:, 0].tolist(), below, equal, strict=True)
    ]
    return list(zip(masks_of(kept), cuts, strict=True))
