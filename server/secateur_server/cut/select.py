"""Selects exactly `count` units with the lowest scores. Ties go to the lowest index.

The key of the threshold is bounded by a sample, or by the search over histograms. Then one pass
marks all units outside the bounds, and collects the few inside, which are sorted. The scores are
neither sorted nor copied. A poor sample costs time, but does not change the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur_server.backends.keys import BITS, as_keys, score_at
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import BYTES_OF_FEW, Cut, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.backends.scan import SPACING
from secateur_server.cut.drivers import Driver, driver_for
from secateur_server.cut.mark import mark, mark_ties
from secateur_server.cut.observe import observe_key, observe_sample
from secateur_server.cut.score import Ranking, score_dtype
from secateur_server.cut.search import Query, Search, narrow
from secateur_server.cut.sorted_keys import FEW
from secateur_server.runtime.context import RequestContext

# All units divided by FEW_OF, or FEW, are sorted at once.
FEW_OF = 64

# More units are sampled: at least SAMPLE, and one unit in SPACING.
LARGE = 1 << 22
SAMPLE = 1 << 17


NO_CUT = Cut(key=-1, ties=0, equal=0)


@dataclass(frozen=True)
class Units:
    """All units that are compared.

    Attributes:
        context: The request.
        driver: Of the pieces.
        pieces: The units in their order.
        dtype: In which all scores are compared.
        candidates: How many units can be pruned.
        sampled: Keys of some candidates, if there is a sample already.
    """

    context: RequestContext
    driver: Driver
    pieces: Sequence[Piece]
    dtype: torch.dtype
    candidates: int
    sampled: Sequence[Tensor] = ()

    @property
    def total(self) -> int:
        """The number of units, including pruned ones."""
        return sum(piece.units for piece in self.pieces)

    @property
    def few(self) -> int:
        """The number of units that can be sorted at once."""
        share = self.total // FEW_OF
        if (memory := self.context.work_memory) is not None:
            share = min(share, memory // BYTES_OF_FEW)
        return max(FEW, share)


def select(
    context: RequestContext, rankings: Sequence[Ranking], candidates: int, count: int
) -> tuple[list[Mask], Cut]:
    """Prunes `count` of the candidates of all rankings.

    Args:
        context: The request.
        rankings: On one device.
        candidates: How many candidates all rankings have.
        count: Units to prune, at most `candidates`.

    Returns:
        The candidates of each ranking that are kept, and the cut.
    """
    driver, dtype = driver_for(context, rankings[0].device), score_dtype(rankings)
    size = driver.backend.ranked
    pieces = [piece for ranking in context.each(rankings) for piece in ranking.pieces(dtype, size)]
    units = Units(context, driver, pieces, dtype, candidates, _sampled(rankings, dtype))
    cut, kept = _cut(units, count)
    masks = torch.split(kept, [(ranking.units + 7) // 8 for ranking in rankings])
    return [Mask(bits, r.units) for bits, r in zip(masks, rankings, strict=True)], cut


def _sampled(rankings: Sequence[Ranking], dtype: torch.dtype) -> list[Tensor]:
    """The keys of sampled candidates; none if a tensor has no sample."""
    found = []
    for ranking in rankings:
        if ranking.sample is None:
            return []
        at, values = ranking.sample.at, ranking.sample.values
        values = values if ranking.candidates is None else values[ranking.candidates.at(at)]
        found.append(as_keys(values, dtype))
    return found


def _cut(units: Units, count: int) -> tuple[Cut, Tensor]:
    """The cut, and the bits of the units that are kept, each piece from a new byte on."""
    if count == 0:
        kept, _ = mark(units.context, units.driver, units.pieces, 0, 0)
        return NO_CUT, kept
    if units.total <= FEW:
        task = partial(_cut_few, count=count)
        (few,) = units.driver.map(units.context, task, [units.pieces])
        return few
    bounds = _sampled_bounds(units, count)
    found = bounds and _cut_between(units, count, *bounds)
    if found is None:
        found = _cut_between(units, count, *_searched_bounds(units, count))
    assert found is not None, "histograms count every unit"
    return found


def _cut_few(
    context: RequestContext, backend: Backend, pieces: Sequence[Piece], count: int
) -> tuple[Cut, Tensor]:
    return backend.cut_few(context, pieces, count)


def _cut_between(units: Units, count: int, low: int, high: int) -> tuple[Cut, Tensor] | None:
    """Does `_cut`; None if the cut is not in [low, high).

    Equal bounds are a key with too many ties to collect them.
    """
    if low == high:
        return _cut_at(units, count, low)
    backend = units.driver.backend
    kept, found = mark(units.context, units.driver, units.pieces, low, high)
    sizes = [len(part.keys) for part in found]
    place = count - (units.candidates - sum(part.above for part in found) - sum(sizes))
    if not 1 <= place <= sum(sizes):  # of the cut among those within
        return None
    keys = torch.cat([part.keys for part in found])
    cut, is_kept = backend.rank(keys, place)
    for part, flags in zip(units.context.each(found), torch.split(is_kept, sizes), strict=True):
        backend.keep(part.kept, part.at, flags)
    return cut, kept


def _cut_at(units: Units, count: int, key: int) -> tuple[Cut, Tensor] | None:
    (found,) = observe_key(units.context, units.driver, [units.pieces], key)
    equal = [at for _, at in found]
    cut = Cut(key, count - sum(below for below, _ in found), sum(equal))
    if not 1 <= cut.ties <= cut.equal:
        return None
    return cut, mark_ties(units.context, units.driver, units.pieces, cut, equal)


def _sampled_bounds(units: Units, count: int) -> tuple[int, int] | None:
    """Bounds [low, high) that almost certainly contain the threshold.

    If the likely threshold is heavily tied, it is returned as both bounds. None if there are few
    units, or the bounds would be too wide.
    """
    keys = _sample(units)
    if keys is None:
        return None
    backend, share = units.driver.backend, count / units.candidates
    margin = 4 * math.sqrt(len(keys) * share * (1 - share)) + 1  # 4 standard deviations
    first, last = math.floor(len(keys) * share - margin), math.ceil(len(keys) * share + margin)
    low = backend.kth(keys, first) if first >= 1 else 0
    high = backend.kth(keys, last) + 1 if last <= len(keys) else torch.iinfo(keys.dtype).max
    within = int(((keys >= low) & (keys < high)).count_nonzero())
    if within * FEW_OF <= len(keys):
        return low, high
    likely = backend.kth(keys, max(1, round(len(keys) * share)))
    are_ties = 2 * int((keys == likely).count_nonzero()) > within
    return (likely, likely) if are_ties else None


def _sample(units: Units) -> Tensor | None:
    """The keys of some candidates; None if there are too few."""
    if units.total < LARGE:
        return None
    spacing = min(SPACING, units.total // SAMPLE)
    if (memory := units.context.work_memory) is not None:
        spacing = max(spacing, units.total * BYTES_OF_FEW // memory)
    if units.sampled:
        keys = torch.cat(list(units.sampled))
    else:
        size = units.driver.backend.ranked
        keys = observe_sample(units.context, units.driver, units.pieces, size, spacing)
    # There may be fewer keys if tensors are small, or if most units are pruned.
    return keys if len(keys) >= SAMPLE // 2 else None


def _searched_bounds(units: Units, count: int) -> tuple[int, int]:
    """As `_sampled_bounds`, and certain: by histograms of all keys."""
    largest = torch.iinfo(BITS[units.dtype]).max
    if units.candidates <= units.few:
        return 0, largest
    search = Search(Query((0,), (0,), (units.candidates,), count), units.dtype)
    narrow(units.context, units.driver, [units.pieces], [search], units.dtype, units.few)
    low = search.prefix << search.left
    if search.equal[0] > units.few:
        return low, low
    return low, min((search.prefix + 1) << search.left, largest)


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """Returns the score at a cut; None if nothing is pruned."""
    if cut == NO_CUT:
        return None
    return score_at(cut.key, dtype)
