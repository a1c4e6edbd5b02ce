"""The sorted keys of few units, which take less time than histograms of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur_server.backends.keys import BITS, as_keys
from secateur_server.backends.pieces import Ints
from secateur_server.cut.drivers import Driver
from secateur_server.cut.score import Ranking
from secateur_server.runtime.context import RequestContext

# So many units of one tensor are sorted.
FEW = 1 << 17

# Tensors are small up to so many units on average, and so many in all.
MEAN_UNITS = 1 << 12
MOST_UNITS = 1 << 22


def candidate_keys(driver: Driver, ranking: Ranking, dtype: torch.dtype) -> Tensor:
    """Computes the keys of a tensor's candidates, in their order."""
    keys = driver.backend.keys(ranking.piece(dtype, 0, ranking.units))
    return keys if ranking.candidates is None else keys[keys < torch.iinfo(keys.dtype).max]


class SortedKeys:
    """The keys of all units of small tensors.

    Attributes:
        ascending: The keys of the candidates of all tensors.
    """

    def __init__(
        self,
        context: RequestContext,
        driver: Driver,
        rankings: Sequence[Ranking],
        dtype: torch.dtype,
    ) -> None:
        """Sorts the keys of the scores, compared as `dtype`."""
        self._keys = _keys(context, driver, rankings, dtype)
        units = torch.tensor([ranking.units for ranking in rankings])
        self._ends = units.cumsum(0).to(driver.backend.device)
        self._begins = self._ends - units.to(driver.backend.device)
        candidates = sum(ranking.count_candidates(context) for ranking in rankings)
        self.ascending = driver.backend.ascending(self._keys)[:candidates]

    def up_to(self, key: int) -> Ints:
        """Counts the candidates of each tensor with a key up to `key`."""
        running = (self._keys <= key).cumsum(0)
        running = torch.cat([running.new_zeros(1), running])
        counts: Ints = (running[self._ends] - running[self._begins]).cpu().numpy()
        return counts


def is_sorting_faster(rankings: Sequence[Ranking]) -> bool:
    """Whether it is faster to sort the keys of all tensors at once."""
    units = sum(ranking.units for ranking in rankings)
    return len(rankings) > 1 and units <= min(MOST_UNITS, MEAN_UNITS * len(rankings))


def _keys(
    context: RequestContext, driver: Driver, rankings: Sequence[Ranking], dtype: torch.dtype
) -> Tensor:
    """The keys of all units in their order. Pruned units have the largest integer."""
    if len({None if ranking.is_random else ranking.values.dtype for ranking in rankings}) > 1 or (
        rankings[0].is_random
    ):
        pieces = (ranking.piece(dtype, 0, ranking.units) for ranking in context.each(rankings))
        return torch.cat([driver.backend.keys(piece) for piece in pieces])
    keys = as_keys(torch.cat([ranking.values for ranking in rankings]), dtype)  # one operation
    end = 0
    for ranking in context.each(rankings):
        begin, end = end, end + ranking.units
        if ranking.candidates is not None:
            pruned = ~ranking.candidates.flags(0, ranking.units)
            keys[begin:end].masked_fill_(pruned, torch.iinfo(BITS[dtype]).max)
    return keys
