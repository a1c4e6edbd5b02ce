"""The sums of squares that each of many cuts prunes, from one pass over a tensor."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import PART, Cut, Piece, row_sums
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import Driver
from secateur_server.cut.observe import observe_squares
from secateur_server.cut.score import Ranking
from secateur_server.runtime.context import RequestContext


def energies(
    context: RequestContext,
    driver: Driver,
    ranking: Ranking,
    weight: Tensor,
    cuts: Sequence[Cut],
    dtype: torch.dtype,
) -> tuple[list[float], float]:
    """Sums the squares of the weights that each cut prunes.

    Args:
        context: The request.
        driver: Of the tensor.
        ranking: The units of a tensor.
        weight: Flat, one element for each unit.
        cuts: In any order, with keys of `dtype`. A cut with a negative key prunes nothing.
        dtype: In which the scores are compared.

    Returns:
        The sum of each cut, and that of all candidates.
    """
    parts = spans(ranking.units, PART)
    distinct = sorted({cut.key for cut in cuts if cut.key >= 0})
    keys = torch.tensor(distinct, dtype=BITS[dtype], device=ranking.device)
    pieces = [(ranking.piece(dtype, *span), weight[slice(*span)]) for span in parts]
    squares, units = observe_squares(context, driver, pieces, keys)
    sums = _running(squares, 2 * len(distinct) + 1, torch.float64)
    equal = _running([of[1::2] for of in units], len(distinct), torch.int64)
    up_to: list[float] = sums[-1].cumsum(0).tolist()
    # Lists, as reading an element of a tensor takes 20 times as long, and there may be many cuts.
    running, counts = sums.T.tolist(), equal.T.tolist()
    places = {key: place for place, key in enumerate(distinct)}
    found, some = [], []
    for cut in context.each(cuts):
        if cut.key < 0:
            found.append((0.0, 0.0, False))
            continue
        j = places[cut.key]
        # All ties of the first parts are pruned, and then the first ties of the next part.
        whole = bisect_right(counts[j], cut.ties, 1) - 1
        rest = cut.ties - counts[j][whole]
        found.append((up_to[2 * j], running[2 * j + 1][whole], rest > 0))
        if rest:
            some.append((*pieces[whole], cut.key, rest))
    first = iter(driver.map(context, _sum_first_ties, some))
    pruned = [below + (ties + next(first) if more else ties) for below, ties, more in found]
    return pruned, up_to[-1]


def _sum_first_ties(
    context: RequestContext, backend: Backend, part: tuple[Piece, Tensor, int, int]
) -> float:
    """The sum of squares of the values of a piece's first candidates that have a key."""
    piece, values, key, count = part
    at = (backend.keys(piece) == key).nonzero().view(-1)[:count]
    return float(row_sums(values[at].to(torch.float64).square().view(1, -1)))


def _running(of_parts: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The sums of the first parts, from none to all.  Returns: (parts + 1, size)."""
    return torch.stack([torch.zeros(size, dtype=dtype), *of_parts]).cumsum(0)
