"""Which units go: exactly so many of the least important, ties by the lowest index.

A key is a non-negative integer that orders units as their scores do. Of a floating score it is
the bit pattern of the absolute value, which IEEE 754 orders as the values; so one selection serves
every dtype, and exactly. The count-th smallest key is found digit by digit, 16 bits at a time, from
histograms: summaries of pieces, which add up (radix select; no sort, no copy of the scores).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from secateur_server.pruning.score import PIECE, RandomScores, Ranking, random_keys

DIGIT_BITS = 16
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
    end = min(end, ranking.units)
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
    prefix, place = 0, count  # the place of the cut among the keys that begin with prefix, from 1
    for shift in reversed(range(0, torch.iinfo(KEY_DTYPES[dtype]).bits, DIGIT_BITS)):
        counts = reduce(
            torch.add, (observe(piece, prefix, shift).cpu() for piece in _pieces(rankings, dtype))
        )
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, place))
        equal = int(counts[digit])
        place -= int(up_to[digit]) - equal
        prefix = (prefix << DIGIT_BITS) | digit
    return Cut(prefix, place, equal)


def mark(ranking: Ranking, dtype: torch.dtype, cut: Cut, ties: int) -> tuple[Tensor, int]:
    """Applies the cut to the units of one tensor.

    ties: how many of the units at the cut are still to be pruned.
    Returns: the units kept, bool, flat (what was pruned before does not count: it is True); and
        how many ties are left for the tensors behind.
    """
    kept = torch.empty(ranking.units, dtype=torch.bool, device=ranking.device)
    for begin in range(0, ranking.units, PIECE):
        piece = keys(ranking, dtype, begin, begin + PIECE)
        part = kept[begin : begin + PIECE]
        torch.gt(piece, cut.key, out=part)
        if cut.ties:
            at_cut = (piece == cut.key).nonzero().view(-1)
            part[at_cut[ties:]] = True
            ties = max(0, ties - len(at_cut))
    return kept, ties


def threshold(cut: Cut, dtype: torch.dtype) -> float | None:
    """The score at the cut; None where nothing is pruned."""
    if cut == NOTHING:
        return None
    return torch.tensor(cut.key, dtype=KEY_DTYPES[dtype]).view(dtype).item()


def _pieces(rankings: Sequence[Ranking], dtype: torch.dtype) -> Iterator[Tensor]:
    for ranking in rankings:
        for begin in range(0, ranking.units, PIECE):
            yield keys(ranking, dtype, begin, begin + PIECE)
