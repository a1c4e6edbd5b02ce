"""Which units go: exactly so many of the least important, ties by the lowest index.

A key is a non-negative integer that orders units as their scores do. Of a floating score it is
the bit pattern of the absolute value, which IEEE 754 orders as the values; so one selection serves
every dtype, and exactly. The count-th smallest key is found digit by digit, 16 bits at a time, from
histograms: summaries of pieces, which add up (radix select; no sort, no copy of the scores).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from secateur_server.pruning.parallel import CORES, each, spans
from secateur_server.pruning.score import RandomScores, Ranking, random_keys

DIGIT_BITS = 16
# Up to so many units are ranked at once.
FEW = 1 << 17
KEY_DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@dataclass(frozen=True)
class Cut:
    """Prune the units with keys below `key`, and the first `ties` of the `equal` ones at it."""

    key: int
    ties: int
    equal: int


NOTHING = Cut(key=-1, ties=0, equal=0)


def score_dtype(rankings: Sequence[Ranking]) -> torch.dtype:
    """The dtype in which all scores compare without loss; random ones have 32-bit keys anyway."""
    dtypes = (
        torch.float32 if isinstance(r.scores, RandomScores) else r.scores.dtype for r in rankings
    )
    return reduce(torch.promote_types, dtypes)


def keys(ranking: Ranking, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Keys of the units [begin, end) for scores compared as `dtype`.

    Returns: int16, int32 or int64, 1-D. What is pruned already has the largest integer, which is
    the key of no score, and is so never chosen.
    """
    if isinstance(ranking.scores, RandomScores):
        made = random_keys(ranking.scores, begin, end, ranking.device)
    else:
        made = ranking.scores[begin:end].to(dtype).view(KEY_DTYPES[dtype])
        made = made & torch.iinfo(made.dtype).max  # the sign goes
    if ranking.alive is not None:
        made.masked_fill_(~ranking.alive[begin:end], torch.iinfo(made.dtype).max)
    return made


def observe(piece: Tensor, prefix: int, shift: int) -> Tensor:
    """Counts the digits at `shift` of the keys whose higher digits are `prefix`.

    piece: keys, 1-D.  Returns: int64, 2^16 counts. Those of pieces add up to that of the whole.
    """
    if shift + DIGIT_BITS < torch.iinfo(piece.dtype).bits:
        piece = piece[(piece >> (shift + DIGIT_BITS)) == prefix]
        digits = (piece >> shift) & ((1 << DIGIT_BITS) - 1)
    else:  # the highest digit: nothing above it, and no sign
        digits = piece >> shift
    return torch.bincount(digits, minlength=1 << DIGIT_BITS)


def decide(rankings: Sequence[Ranking], dtype: torch.dtype, count: int) -> Cut:
    """Finds the cut below which `count` units of all `rankings` lie.

    count: at least 1, at most the number of units alive.
    """
    if sum(ranking.units for ranking in rankings) <= FEW:
        return _decide_among_few(rankings, dtype, count)
    prefix, place = 0, count  # the place of the cut among the keys that begin with prefix, from 1
    for shift in reversed(range(0, torch.iinfo(KEY_DTYPES[dtype]).bits, DIGIT_BITS)):
        counts = _observe_all(rankings, dtype, prefix, shift)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, place))
        equal = int(counts[digit])
        place -= int(up_to[digit]) - equal
        prefix = (prefix << DIGIT_BITS) | digit
    return Cut(prefix, place, equal)


def _observe_all(
    rankings: Sequence[Ranking], dtype: torch.dtype, prefix: int, shift: int
) -> Tensor:
    """The counts of all units. Each core adds up those of its share of the pieces."""
    pieces = [(r, *span) for r in rankings for span in spans(r.units)]

    def counts_of(share: Sequence[tuple[Ranking, int, int]]) -> Tensor:
        total = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        for ranking, begin, end in share:
            total += observe(keys(ranking, dtype, begin, end), prefix, shift).cpu()
        return total

    size = -(-len(pieces) // CORES)
    return reduce(torch.add, each(counts_of, [pieces[b:e] for b, e in spans(len(pieces), size)]))


def _decide_among_few(rankings: Sequence[Ranking], dtype: torch.dtype, count: int) -> Cut:
    """As `decide`: for few units 2^16 counts are more work than the units."""
    joined = torch.cat([keys(ranking, dtype, 0, ranking.units) for ranking in rankings])
    key = int(joined.kthvalue(count).values)
    below = int((joined < key).count_nonzero())
    return Cut(key, count - below, int((joined == key).count_nonzero()))


def mark(rankings: Sequence[Ranking], dtype: torch.dtype, cut: Cut) -> tuple[list[Tensor], int]:
    """Applies the cut.

    Returns: for each ranking the units that are alive and stay so, bool, flat; and how many units
        of all were pruned.
    """
    kept = [torch.empty(r.units, dtype=torch.bool, device=r.device) for r in rankings]
    pieces = [
        (ranking, units[begin:end], begin, end)
        for ranking, units in zip(rankings, kept, strict=True)
        for begin, end in spans(ranking.units)
    ]
    before = [0] * len(pieces)  # ties in the pieces that come before
    if cut.ties < cut.equal:
        equal = each(lambda p: int((keys(p[0], dtype, *p[2:]) == cut.key).count_nonzero()), pieces)
        before = [0, *itertools.accumulate(equal)][:-1]

    def mark_piece(numbered: tuple[int, tuple[Ranking, Tensor, int, int]]) -> int:
        number, (ranking, part, begin, end) = numbered
        found = keys(ranking, dtype, begin, end)
        quota = max(0, cut.ties - before[number]) if cut.ties < cut.equal else cut.ties
        _mark_piece(found, cut, quota, part)
        pruned = len(part) - int(part.count_nonzero())  # what was pruned before has the largest key
        if ranking.alive is not None:
            part &= ranking.alive[begin:end]
        return pruned

    return kept, sum(each(mark_piece, enumerate(pieces)))


def _mark_piece(found: Tensor, cut: Cut, quota: int, part: Tensor) -> None:
    """Writes which of the keys `found` are kept, where the first `quota` ties are pruned."""
    if quota == 0:
        torch.ge(found, cut.key, out=part)
        return
    torch.gt(found, cut.key, out=part)
    if cut.ties < cut.equal:
        part[(found == cut.key).nonzero().view(-1)[quota:]] = True


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """The score at the cut; None where nothing is pruned."""
    if cut == NOTHING:
        return None
    return torch.tensor(cut.key, dtype=KEY_DTYPES[dtype]).view(dtype).item()
