"""The sums of squares that each of many cuts prunes, from one pass over a tensor."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur_server.backends import Span, backend_for, spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import PART, Cut, row_sums
from secateur_server.cut.score import Ranking
from secateur_server.cut.select import piece_of
from secateur_server.runtime.context import RequestContext


def energies(
    context: RequestContext,
    ranking: Ranking,
    weight: Tensor,
    cuts: Sequence[Cut],
    dtype: torch.dtype,
) -> tuple[list[float], float]:
    """Sums the squares of the weights that each cut prunes.

    Args:
        context: The request.
        ranking: The units of a tensor.
        weight: Flat, one element for each unit.
        cuts: In any order, with keys of `dtype`. A cut with a negative key prunes nothing.
        dtype: In which the scores are compared.

    Returns:
        The sum of each cut, and that of all candidates.
    """
    backend, parts = backend_for(ranking.device), spans(ranking.units, PART)
    distinct = sorted({cut.key for cut in cuts if cut.key >= 0})
    keys = torch.tensor(distinct, dtype=BITS[dtype], device=backend.device)

    def sums_of(span: Span) -> tuple[Tensor, Tensor]:
        return backend.sum_squares(piece_of(ranking, dtype, *span), weight[slice(*span)], keys)

    found = backend.map(context, sums_of, parts)
    sums = _running([of for of, _ in found], 2 * len(distinct) + 1, torch.float64)
    equal = _running([of[1::2] for _, of in found], len(distinct), torch.int64)
    up_to: list[float] = sums[-1].cumsum(0).tolist()
    # Lists, as reading an element of a tensor takes 20 times as long, and there may be many cuts.
    running, counts = sums.T.tolist(), equal.T.tolist()
    places = {key: place for place, key in enumerate(distinct)}

    def energy(cut: Cut) -> float:
        if cut.key < 0:
            return 0.0
        j = places[cut.key]
        # All ties of the first parts are pruned, and then the first ties of the next part.
        whole = bisect_right(counts[j], cut.ties, 1) - 1
        ties: float = running[2 * j + 1][whole]
        if rest := cut.ties - counts[j][whole]:
            ties += float(_first_ties(ranking, weight, cut.key, rest, parts[whole], dtype))
        return up_to[2 * j] + ties

    return backend.map(context, energy, cuts), up_to[-1]


def _running(of_parts: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The sums of the first parts, from none to all.  Returns: (parts + 1, size)."""
    return torch.stack([torch.zeros(size, dtype=dtype), *of_parts]).cumsum(0)


def _first_ties(
    ranking: Ranking, weight: Tensor, key: int, count: int, span: Span, dtype: torch.dtype
) -> Tensor:
    """The sum of squares of the first `count` units with a key in a part."""
    keys = backend_for(ranking.device).keys(piece_of(ranking, dtype, *span))
    at = (keys == key).nonzero().view(-1)[:count]
    squares = weight[slice(*span)][at].to(torch.float64).square()
    return row_sums(squares.view(1, -1))[0].cpu()
