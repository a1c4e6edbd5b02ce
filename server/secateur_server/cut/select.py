"""Which units go: exactly so many of the least important, ties by the lowest index.

The cut is the key below which the units go. Bounds between which it lies come from a sample, or
from histograms of 16 bits a pass, which add up over pieces (radix select); then one pass over all
units settles what is outside of the bounds, and collects the few inside, which are ranked at once.
No sort and no copy of the scores; what a sample misses costs time, never a unit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from secateur_server.backends import passes_of, room_to_work, spans
from secateur_server.backends.keys import BITS, as_keys, score_at
from secateur_server.backends.looks import SPACING, sample_places
from secateur_server.backends.masks import Mask
from secateur_server.backends.passes import BYTES_OF_FEW, DIGIT_BITS, Cut, Passes, Piece
from secateur_server.backends.randomness import RandomScores
from secateur_server.cut.score import Ranking
from secateur_server.runtime.context import RequestContext

# Up to so many units, or this share of all, are ranked at once.
FEW = 1 << 17
FEW_OF = 64

# Of more units a sample is taken: of at least SAMPLE, and of one unit in SPACING.
LARGE = 1 << 22
SAMPLE = 1 << 17


NO_CUT = Cut(key=-1, ties=0, equal=0)


@dataclass(frozen=True)
class Units:
    """All units that are ranked together, in pieces, in their order.

    kept: for each piece the bits of what is alive and stays so, written to.
    sampled: keys of some of those that are alive, where there are some already.
    """

    context: RequestContext
    passes: Passes
    pieces: Sequence[Piece]
    kept: Sequence[Tensor]
    candidates: int
    sampled: Sequence[Tensor] = ()

    @property
    def total(self) -> int:
        """How many there are, with those that are pruned already."""
        return sum(piece.units for piece in self.pieces)

    @property
    def few(self) -> int:
        """How many can be ranked at once."""
        share = self.total // FEW_OF
        if (memory := self.context.work_memory) is not None:
            share = min(share, memory // BYTES_OF_FEW)
        return max(FEW, share)


def score_dtype(rankings: Sequence[Ranking]) -> torch.dtype:
    """The dtype in which all scores compare without loss."""
    return reduce(torch.promote_types, {ranking.dtype for ranking in rankings})


def select(
    context: RequestContext, rankings: Sequence[Ranking], candidates: int, count: int
) -> tuple[list[Mask], Cut]:
    """Prunes `count` of the `alive` units of all `rankings`.

    Returns: for each ranking the units that are alive and stay so.
    """
    passes, dtype = passes_of(rankings[0].device), score_dtype(rankings)
    sizes = [(r.units + 7) // 8 for r in rankings]
    room = torch.split(room_to_work(context, sum(sizes), passes), sizes)
    masks = [Mask(bits, r.units) for bits, r in zip(room, rankings, strict=True)]
    parts = [
        (piece_of(ranking, dtype, *span), mask.part(*span))
        for ranking, mask in zip(context.each(rankings), masks, strict=True)
        for span in spans(ranking.units, passes.ranked)
    ]
    pieces, kept = [piece for piece, _ in parts], [kept for _, kept in parts]
    units = Units(context, passes, pieces, kept, candidates, _sampled(rankings, dtype))
    return masks, _apply(units, count)


def piece_of(ranking: Ranking, dtype: torch.dtype, begin: int, end: int) -> Piece:
    """The units [begin, end) of a ranking, to be compared as `dtype`.  begin: a multiple of 8."""
    candidates = None if ranking.candidates is None else ranking.candidates.part(begin, end)
    if isinstance(ranking.scores, RandomScores):
        scores: Tensor | RandomScores = RandomScores(ranking.scores.state, begin)
    else:
        scores = ranking.scores[begin:end]
    return Piece(end - begin, scores, dtype, candidates)


def _sampled(rankings: Sequence[Ranking], dtype: torch.dtype) -> list[Tensor]:
    """The keys of a sample of what is alive; none, where one of the tensors has no sample."""
    found = []
    for ranking in rankings:
        if ranking.sample is None:
            return []
        at, values = ranking.sample.at, ranking.sample.values
        values = values if ranking.candidates is None else values[ranking.candidates.at(at)]
        found.append(as_keys(values, dtype))
    return found


def _apply(units: Units, count: int) -> Cut:
    """Marks what stays when `count` units go.  Returns: the cut."""
    if count == 0:
        units.passes.split_all(units.context, units.pieces, 0, 0, units.kept)
        return NO_CUT
    if units.total <= FEW:
        return units.passes.cut_few(units.context, units.pieces, count, units.kept)
    return _cut_by_sample(units, count) or _cut_by_digits(units, count)


def _cut_by_sample(units: Units, count: int) -> Cut | None:
    """Marks what stays, if a sample shows where the cut is.  Returns: the cut; None if not."""
    bounds = _sampled_bounds(units, count)
    if bounds is None:
        return None
    low, high = bounds
    return _cut_at(units, count, low) if low == high else _cut_within(units, count, low, high)


def _cut_within(units: Units, count: int, low: int, high: int) -> Cut | None:
    """Marks what stays, if the cut is in [low, high).  Returns: the cut; None where it is not."""
    found = units.passes.split_all(units.context, units.pieces, low, high, units.kept)
    sizes = [len(part.keys) for part in found]
    place = count - (units.candidates - sum(part.above for part in found) - sum(sizes))
    if not 1 <= place <= sum(sizes):  # of the cut among those within
        return None
    keys = torch.cat([part.keys for part in found])
    cut, stays = units.passes.rank(keys, place)
    for kept, part, stay in zip(units.kept, found, torch.split(stays, sizes), strict=True):
        units.passes.keep(kept, part.at, stay)
    return cut


def _sampled_bounds(units: Units, count: int) -> tuple[int, int] | None:
    """Bounds [low, high) of the cut that are all but certain.

    Where many units have the key that it is likely to be: that key, as both. None where there are
    few units, or the sample tells too little.
    """
    keys = _sample(units)
    if keys is None:
        return None
    passes, share = units.passes, count / units.candidates
    spread = 4 * math.sqrt(len(keys) * share * (1 - share)) + 1  # 4 standard deviations
    first, last = math.floor(len(keys) * share - spread), math.ceil(len(keys) * share + spread)
    low = passes.kth(keys, first) if first >= 1 else 0
    high = passes.kth(keys, last) + 1 if last <= len(keys) else torch.iinfo(keys.dtype).max
    within = int(((keys >= low) & (keys < high)).count_nonzero())
    if within * FEW_OF <= len(keys):
        return low, high
    likely = passes.kth(keys, max(1, round(len(keys) * share)))
    are_ties = 2 * int((keys == likely).count_nonzero()) > within
    return (likely, likely) if are_ties else None


def _sample(units: Units) -> Tensor | None:
    """The keys of some of the units that are alive; None where there are too few."""
    if units.total < LARGE:
        return None
    passes, spacing = units.passes, min(SPACING, units.total // SAMPLE)
    if (memory := units.context.work_memory) is not None:
        spacing = max(spacing, units.total * BYTES_OF_FEW // memory)
    index = sample_places(passes.ranked, spacing, passes.device)
    # In one thread: many small pieces would have threads wait for each other.
    sampled = units.sampled or [
        passes.sample(piece, index) for piece in units.context.each(units.pieces)
    ]
    keys = torch.cat(list(sampled))
    # Of many small tensors there may be fewer, and where most are pruned.
    return keys if len(keys) >= SAMPLE // 2 else None


def _cut_at(units: Units, count: int, key: int) -> Cut | None:
    """As _cut_within, of one key, which too many units have to collect them."""
    passes = units.passes
    found = passes.map(units.context, lambda piece: passes.count_below(piece, key), units.pieces)
    below, equal = (list(of) for of in zip(*found, strict=True))
    cut = Cut(key, count - sum(below), sum(equal))
    return _mark_ties(units, cut, equal) if 1 <= cut.ties <= cut.equal else None


def _cut_by_digits(units: Units, count: int) -> Cut:
    """As _cut_within, without bounds: they are found from histograms."""
    # The cut is the place-th, from 1, of the `equal` keys that have the digits `prefix` above
    # `shift`: at first, of all, as the sign is gone.
    integers = torch.iinfo(BITS[units.pieces[0].dtype])
    prefix, shift = 0, integers.bits - 1
    place, equal = count, units.candidates
    few = units.few
    while shift > 0 and equal > few:
        shift = (shift - 1) // DIGIT_BITS * DIGIT_BITS
        counts = _count_digits(units, prefix, shift)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, place))
        equal = int(counts[digit])
        place -= int(up_to[digit]) - equal
        prefix = (prefix << DIGIT_BITS) | digit
    low, high = prefix << shift, min((prefix + 1) << shift, integers.max)
    are_ties = equal > few
    cut = _cut_at(units, count, low) if are_ties else _cut_within(units, count, low, high)
    assert cut is not None, "histograms count every unit"
    return cut


def _count_digits(units: Units, prefix: int, shift: int) -> Tensor:
    """The counts of all pieces, added up in as few histograms as there are threads."""
    passes, pieces = units.passes, units.pieces

    def counts_of(share: Sequence[Piece]) -> Tensor:
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=passes.device)
        for piece in share:
            units.context.check()
            passes.add_digits(piece, prefix, shift, counts)
        return counts

    size = -(-len(pieces) // passes.threads)
    shares = [pieces[begin:end] for begin, end in spans(len(pieces), size)]
    return reduce(torch.add, passes.map(units.context, counts_of, shares))


def _mark_ties(units: Units, cut: Cut, equal: Sequence[int]) -> Cut:
    """Marks what stays.  equal: how many units of each piece are at the cut."""
    passes = units.passes
    before = itertools.accumulate(equal, initial=0)

    def mark(part: tuple[Piece, Tensor, int, int]) -> None:
        piece, kept, equal, before = part
        going = min(max(cut.ties - before, 0), equal)
        # All of a piece's ties go, or none do, but for one piece in which the first ones go.
        low, high = cut.key + (going == equal), cut.key + (going > 0)
        _, at = passes.split(piece, low, high, kept)
        passes.keep(kept, at, torch.arange(len(at), device=at.device) >= going)

    passes.map(
        units.context, mark, list(zip(units.pieces, units.kept, equal, before, strict=False))
    )
    return cut


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """The score at the cut; None where nothing is pruned."""
    if cut == NO_CUT:
        return None
    return score_at(cut.key, dtype)
