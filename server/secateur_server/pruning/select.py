"""Which units go: exactly so many of the least important, ties by the lowest index.

The count-th smallest key is found digit by digit, 16 bits at a time, from histograms: summaries of
pieces, which add up (radix select; no sort, no copy of the scores).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from secateur_server.pruning.kernels import BITS
from secateur_server.pruning.parallel import CORES, each, spans
from secateur_server.pruning.passes import DIGIT_BITS, Piece, add_digits, count_equal, keys
from secateur_server.pruning.passes import mark as mark_piece
from secateur_server.pruning.score import RandomScores, Ranking

# Up to so many units are ranked at once.
FEW = 1 << 17


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


def pieces_of(rankings: Sequence[Ranking], dtype: torch.dtype) -> list[Piece]:
    """All units, in their order."""
    return [Piece(ranking, dtype, *span) for ranking in rankings for span in spans(ranking.units)]


def decide(rankings: Sequence[Ranking], dtype: torch.dtype, count: int) -> Cut:
    """Finds the cut below which `count` units of all `rankings` lie.

    count: at least 1, at most the number of units alive.
    """
    if sum(ranking.units for ranking in rankings) <= FEW:
        return _decide_among_few(rankings, dtype, count)
    pieces = pieces_of(rankings, dtype)
    prefix, place = 0, count  # the place of the cut among the keys that begin with prefix, from 1
    for shift in reversed(range(0, torch.iinfo(BITS[dtype]).bits, DIGIT_BITS)):
        counts = _count_digits(pieces, prefix, shift)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, place))
        equal = int(counts[digit])
        place -= int(up_to[digit]) - equal
        prefix = (prefix << DIGIT_BITS) | digit
    return Cut(prefix, place, equal)


def _count_digits(pieces: Sequence[Piece], prefix: int, shift: int) -> Tensor:
    """The counts of all pieces. Each core adds up those of its share."""

    def counts_of(share: Sequence[Piece]) -> Tensor:
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64)
        for piece in share:
            add_digits(piece, prefix, shift, counts)
        return counts

    size = -(-len(pieces) // CORES)
    return reduce(torch.add, each(counts_of, [pieces[b:e] for b, e in spans(len(pieces), size)]))


def _decide_among_few(rankings: Sequence[Ranking], dtype: torch.dtype, count: int) -> Cut:
    """As `decide`: for few units 2^16 counts are more work than the units."""
    joined = torch.cat([keys(Piece(ranking, dtype, 0, ranking.units)) for ranking in rankings])
    key = int(joined.kthvalue(count).values)
    below = int((joined < key).count_nonzero())
    return Cut(key, count - below, int((joined == key).count_nonzero()))


def mark(rankings: Sequence[Ranking], dtype: torch.dtype, cut: Cut) -> tuple[list[Tensor], int]:
    """Applies the cut.

    Returns: for each ranking the units that are alive and stay so, bool, flat; and how many units
        of all those are.
    """
    kept = [torch.empty(r.units, dtype=torch.bool, device=r.device) for r in rankings]
    parts = [units[slice(*span)] for units in kept for span in spans(len(units))]
    pieces = pieces_of(rankings, dtype)
    ties: list[int | None] = [None] * len(pieces)
    if cut.ties < cut.equal:  # the first ties go: a piece needs to know how many lie before it
        equal = each(lambda piece: count_equal(piece, cut.key), pieces)
        before = itertools.accumulate(equal, initial=0)
        left = [max(0, cut.ties - count) for count in before]
        # Of most pieces all ties go, as there are none: which is the faster pass.
        ties = [None if n <= most else most for n, most in zip(equal, left, strict=False)]
    work = list(zip(pieces, ties, parts, strict=True))

    def kept_of(share: Sequence[tuple[Piece, int | None, Tensor]]) -> int:
        return sum(mark_piece(piece, cut.key, ties, part) for piece, ties, part in share)

    # Few units are sooner marked than given to other threads.
    shares = [work] if sum(map(len, kept)) <= FEW else [[one] for one in work]
    return kept, sum(each(kept_of, shares))


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """The score at the cut; None where nothing is pruned."""
    if cut == NOTHING:
        return None
    return torch.tensor(cut.key, dtype=BITS[dtype]).view(dtype).item()
