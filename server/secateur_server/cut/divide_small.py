"""Divisions among many small rankings: sorts all keys at once, where divide.py makes histograms.

One operation on the keys of all rankings replaces several operations on each of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur_server.backends import backend_for
from secateur_server.backends.keys import BITS, as_keys
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import piece_of
from secateur_server.runtime.context import RequestContext

# Rankings are small up to so many units on average, and so many in all.
MEAN_UNITS = 1 << 12
MOST_UNITS = 1 << 22


class SortedKeys:
    """The keys of all units of small rankings.

    Attributes:
        ascending: The keys of the candidates of all rankings.
    """

    def __init__(
        self, context: RequestContext, rankings: Sequence[Ranking], dtype: torch.dtype
    ) -> None:
        """Sorts the keys. `dtype` is that in which the scores of all rankings are compared."""
        backend = backend_for(rankings[0].device)
        self._keys = _keys(context, rankings, dtype)
        units = torch.tensor([ranking.units for ranking in rankings])
        self._ends = units.cumsum(0).to(backend.device)
        self._begins = self._ends - units.to(backend.device)
        candidates = sum(ranking.count_candidates(context) for ranking in rankings)
        self.ascending = backend.ascending(self._keys)[:candidates]

    def up_to(self, key: int) -> Tensor:
        """Counts the candidates of each ranking with a key up to `key`: int64, on the CPU."""
        running = (self._keys <= key).cumsum(0)
        running = torch.cat([running.new_zeros(1), running])
        return (running[self._ends] - running[self._begins]).cpu()


def are_small(rankings: Sequence[Ranking]) -> bool:
    """Whether it is faster to sort the keys of all rankings at once."""
    units = sum(ranking.units for ranking in rankings)
    return len(rankings) > 1 and units <= min(MOST_UNITS, MEAN_UNITS * len(rankings))


def _keys(context: RequestContext, rankings: Sequence[Ranking], dtype: torch.dtype) -> Tensor:
    """The keys of all units in their order. Pruned units have the largest integer."""
    scores = [r.scores for r in rankings if isinstance(r.scores, Tensor)]
    if len(scores) < len(rankings) or len({of.dtype for of in scores}) > 1:
        backend = backend_for(rankings[0].device)
        pieces = (piece_of(r, dtype, 0, r.units) for r in context.each(rankings))
        return torch.cat([backend.keys(piece) for piece in pieces])
    keys = as_keys(torch.cat(scores), dtype)
    end = 0
    for ranking in context.each(rankings):
        begin, end = end, end + ranking.units
        if ranking.candidates is not None:
            pruned = ~ranking.candidates.flags(0, ranking.units)
            keys[begin:end].masked_fill_(pruned, torch.iinfo(BITS[dtype]).max)
    return keys
