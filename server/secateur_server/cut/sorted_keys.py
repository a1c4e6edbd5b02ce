"""The sorted keys of few units, which take less time than histograms of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur_server.backends.keys import as_keys
from secateur_server.backends.pieces import Ints, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Driver
from secateur_server.cut.score import Ranking
from secateur_server.runtime.context import RequestContext

# So many units of one tensor are sorted.
FEW = 1 << 17

# Tensors are small up to so many units on average, and so many in all.
MEAN_UNITS = 1 << 12
MOST_UNITS = 1 << 22


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
        pieces = [ranking.piece(dtype, 0, ranking.units) for ranking in context.each(rankings)]
        (self._keys,) = driver.map(context, _keys, [pieces])
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


def _keys(context: RequestContext, backend: Backend, pieces: Sequence[Piece]) -> Tensor:
    """The keys of all units in their order. Pruned units have the largest integer."""
    stored = [scores for piece in pieces if (scores := piece.scores.stored) is not None]
    if len(stored) < len(pieces) or len({scores.dtype for scores in stored}) > 1:
        return torch.cat([backend.keys(piece) for piece in context.each(pieces)])
    keys = as_keys(torch.cat(stored), pieces[0].dtype)  # one operation
    end = 0
    for piece in context.each(pieces):
        begin, end = end, end + piece.units
        if piece.unpruned is not None:
            pruned = ~backend.unpack(piece.unpruned, piece.units)
            keys[begin:end].masked_fill_(pruned, torch.iinfo(keys.dtype).max)
    return keys
