"""Selects exactly `count` units with the lowest scores. Ties go to the lowest index.

The key of the threshold is bounded by a sample, or by a radix select over histograms of 16 bits,
which add up over pieces. Then one pass marks all units outside the bounds, and collects the few
inside, which are sorted. The scores are neither sorted nor copied. A poor sample costs time, but
does not change the result.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.keys import BITS, as_keys, score_at
from secateur_server.backends.masks import Mask
from secateur_server.backends.pieces import BYTES_OF_FEW, DIGIT_BITS, Cut, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.backends.randomness import RandomScores
from secateur_server.backends.scan import SPACING, sample_places
from secateur_server.cut.score import Ranking
from secateur_server.runtime.context import RequestContext

# So many units, or all units divided by FEW_OF, are sorted at once.
FEW = 1 << 17
FEW_OF = 64

# More units are sampled: at least SAMPLE, and one unit in SPACING.
LARGE = 1 << 22
SAMPLE = 1 << 17


NO_CUT = Cut(key=-1, ties=0, equal=0)


@dataclass(frozen=True)
class Units:
    """All units that are compared, in pieces, in their order.

    Attributes:
        context: The request.
        passes: Of the device.
        pieces: The units.
        kept: The bits of the candidates of each piece that are kept. Written to.
        candidates: How many units can be pruned.
        sampled: Keys of some candidates, if there is a sample already.
    """

    context: RequestContext
    backend: Backend
    pieces: Sequence[Piece]
    kept: Sequence[Tensor]
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


def score_dtype(rankings: Sequence[Ranking]) -> torch.dtype:
    """Returns the dtype in which all scores compare without loss."""
    return reduce(torch.promote_types, {ranking.dtype for ranking in rankings})


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
    backend, dtype = backend_for(rankings[0].device), score_dtype(rankings)
    sizes = [(r.units + 7) // 8 for r in rankings]
    room = torch.split(allocate(context, sum(sizes), backend), sizes)
    masks = [Mask(bits, r.units) for bits, r in zip(room, rankings, strict=True)]
    parts = [
        (piece_of(ranking, dtype, *span), mask.part(*span))
        for ranking, mask in zip(context.each(rankings), masks, strict=True)
        for span in spans(ranking.units, backend.ranked)
    ]
    pieces, kept = [piece for piece, _ in parts], [kept for _, kept in parts]
    units = Units(context, backend, pieces, kept, candidates, _sampled(rankings, dtype))
    return masks, _apply(units, count)


def piece_of(ranking: Ranking, dtype: torch.dtype, begin: int, end: int) -> Piece:
    """Returns the units [begin, end) of a ranking, to be compared as `dtype`.

    `begin` is a multiple of 8.
    """
    candidates = None if ranking.candidates is None else ranking.candidates.part(begin, end)
    if isinstance(ranking.scores, RandomScores):
        scores: Tensor | RandomScores = RandomScores(ranking.scores.state, begin)
    else:
        scores = ranking.scores[begin:end]
    return Piece(end - begin, scores, dtype, candidates)


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


def _apply(units: Units, count: int) -> Cut:
    """Marks the units that are kept, and returns the cut."""
    if count == 0:
        units.backend.split(units.context, units.pieces, 0, 0, units.kept)
        return NO_CUT
    if units.total <= FEW:
        return units.backend.cut_few(units.context, units.pieces, count, units.kept)
    return _cut_by_sample(units, count) or _cut_by_digits(units, count)


def _cut_by_sample(units: Units, count: int) -> Cut | None:
    """Marks the units that are kept and returns the cut, if a sample can bound it; else None."""
    bounds = _sampled_bounds(units, count)
    if bounds is None:
        return None
    low, high = bounds
    return _cut_at(units, count, low) if low == high else _cut_within(units, count, low, high)


def _cut_within(units: Units, count: int, low: int, high: int) -> Cut | None:
    """Marks the units that are kept and returns the cut, if it is in [low, high); else None."""
    found = units.backend.split(units.context, units.pieces, low, high, units.kept)
    sizes = [len(part.keys) for part in found]
    place = count - (units.candidates - sum(part.above for part in found) - sum(sizes))
    if not 1 <= place <= sum(sizes):  # of the cut among those within
        return None
    keys = torch.cat([part.keys for part in found])
    cut, is_kept = units.backend.rank(keys, place)
    for kept, part, within in zip(units.kept, found, torch.split(is_kept, sizes), strict=True):
        units.backend.keep(kept, part.at, within)
    return cut


def _sampled_bounds(units: Units, count: int) -> tuple[int, int] | None:
    """Bounds [low, high) that almost certainly contain the threshold.

    If the likely threshold is heavily tied, it is returned as both bounds. None if there are few
    units, or the bounds would be too wide.
    """
    keys = _sample(units)
    if keys is None:
        return None
    backend, share = units.backend, count / units.candidates
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
    backend, spacing = units.backend, min(SPACING, units.total // SAMPLE)
    if (memory := units.context.work_memory) is not None:
        spacing = max(spacing, units.total * BYTES_OF_FEW // memory)
    index = sample_places(backend.ranked, spacing, backend.device)
    # In one thread, as threads would wait for each other over many small pieces.
    sampled = units.sampled or [
        backend.sample(piece, index) for piece in units.context.each(units.pieces)
    ]
    keys = torch.cat(list(sampled))
    # There may be fewer keys if tensors are small, or if most units are pruned.
    return keys if len(keys) >= SAMPLE // 2 else None


def _cut_at(units: Units, count: int, key: int) -> Cut | None:
    """Does `_cut_within` for a key with too many ties to collect them."""
    backend = units.backend
    found = backend.map(units.context, lambda piece: backend.count_below(piece, key), units.pieces)
    below, equal = (list(of) for of in zip(*found, strict=True))
    cut = Cut(key, count - sum(below), sum(equal))
    return _mark_ties(units, cut, equal) if 1 <= cut.ties <= cut.equal else None


def _cut_by_digits(units: Units, count: int) -> Cut:
    """Marks the units that are kept and returns the cut, which a radix select bounds."""
    # The cut is the place-th key, from 1, of the `equal` keys that have the digits `prefix` above
    # the lowest `shift` bits. At first these are all keys, as keys have no sign.
    integers = torch.iinfo(BITS[units.pieces[0].dtype])
    prefix, shift = 0, integers.bits - 1
    place, equal = count, units.candidates
    few = units.few
    while shift > 0 and equal > few:
        width = (shift - 1) % DIGIT_BITS + 1
        shift -= width
        counts = _count_digits(units, prefix, shift, width)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, place))
        equal = int(counts[digit])
        place -= int(up_to[digit]) - equal
        prefix = (prefix << width) | digit
    low, high = prefix << shift, min((prefix + 1) << shift, integers.max)
    are_ties = equal > few
    cut = _cut_at(units, count, low) if are_ties else _cut_within(units, count, low, high)
    assert cut is not None, "histograms count every unit"
    return cut


def _count_digits(units: Units, prefix: int, shift: int, width: int) -> Tensor:
    """The histogram of all pieces, added up from one for each thread."""
    backend, pieces = units.backend, units.pieces
    prefixes = torch.tensor([prefix], dtype=BITS[pieces[0].dtype])

    def counts_of(share: Sequence[Piece]) -> Tensor:
        counts = torch.zeros(1, 1 << width, dtype=torch.int64, device=backend.device)
        for piece in share:
            units.context.check()
            backend.count_digits(piece, prefixes, shift, width, counts)
        return counts[0]

    size = -(-len(pieces) // backend.threads)
    shares = [pieces[begin:end] for begin, end in spans(len(pieces), size)]
    return reduce(torch.add, backend.map(units.context, counts_of, shares))


def _mark_ties(units: Units, cut: Cut, equal: Sequence[int]) -> Cut:
    """Marks the units that are kept. `equal` are the ties of each piece."""
    backend = units.backend
    before = itertools.accumulate(equal, initial=0)

    def mark(part: tuple[Piece, Tensor, int, int]) -> None:
        piece, kept, equal, before = part
        pruned = min(max(cut.ties - before, 0), equal)
        # All or no ties of a piece are pruned, except in one piece, where the first ones are.
        low, high = cut.key + (pruned == equal), cut.key + (pruned > 0)
        (found,) = backend.split(units.context, [piece], low, high, [kept])
        places = torch.arange(len(found.at), device=found.at.device)
        backend.keep(kept, found.at, places >= pruned)

    backend.map(
        units.context, mark, list(zip(units.pieces, units.kept, equal, before, strict=False))
    )
    return cut


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """Returns the score at a cut; None if nothing is pruned."""
    if cut == NO_CUT:
        return None
    return score_at(cut.key, dtype)
