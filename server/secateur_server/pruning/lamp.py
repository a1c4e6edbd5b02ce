"""Scores of Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning (LAMP)."""

import torch
from torch import Tensor

from secateur_server.devices import passes_of
from secateur_server.devices.passes import Piece
from secateur_server.pruning.score import Ranking
from secateur_server.pruning.select import score_dtype


def lamp(ranking: Ranking) -> Ranking:
    """The LAMP scores of a ranking: s_u^2 / the sum of s_v^2 over all v that rank no lower.

    Of equal scores each counts as lower than the next, so its sum has the next in it.
    Returns: only what is alive, falling: enough to say how many go. float64 scores.
    """
    assert isinstance(ranking.scores, Tensor), "random scores have no LAMP"
    dtype = score_dtype([ranking])
    alive = None if ranking.alive is None else ranking.alive.bits
    passes = passes_of(ranking.device)
    keys = passes.keys(Piece(ranking.units, ranking.scores, dtype, alive))
    if alive is not None:
        keys = keys[keys < torch.iinfo(keys.dtype).max]
    # Sums that run on are made on the CPU: a GPU adds in an order of its own.
    falling = passes.ascending(keys).cpu().view(dtype).flip(0)
    del keys
    scores = _lamp(falling).to(ranking.device)
    return Ranking(ranking.name, len(scores), scores, None, ranking.device)


def _lamp(values: Tensor) -> Tensor:
    """LAMP scores of falling ones.  values: not negative.  Returns: float64, falling."""
    squares = values.to(torch.float64).square_()
    scores = squares / squares.cumsum(0)
    scores[squares == 0] = 0.0  # of 0
    scores[squares.isinf()] = torch.inf  # of infinity
    return scores.cummin(0).values if len(scores) else scores  # rounding turns none around
