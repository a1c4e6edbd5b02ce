"""The passes over the keys of a piece, as operations of torch on any device.

A key is a non-negative integer that orders units as their scores do. Of a floating score it is
the bit pattern of the absolute value, which IEEE 754 orders as the values; so one selection serves
every dtype, and exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur_server.pruning import kernels
from secateur_server.pruning.score import RandomScores, Ranking, random_keys

DIGIT_BITS = 16


@dataclass(frozen=True)
class Piece:
    """The units [begin, end) of a ranking, whose scores are compared as `dtype`."""

    ranking: Ranking
    dtype: torch.dtype
    begin: int
    end: int

    def compiled(self) -> kernels.Piece | None:
        """The piece for the compiled passes; None where they do not take it."""
        scores, part = self.ranking.scores, slice(self.begin, self.end)
        alive = None if self.ranking.alive is None else self.ranking.alive[part]
        if isinstance(scores, RandomScores):
            if self.ranking.device.type != "cpu":
                return None
            return kernels.random_piece(scores.state, self.begin, self.end, alive)
        return kernels.piece_of(scores[part], alive) if scores.dtype == self.dtype else None


def keys(piece: Piece) -> Tensor:
    """The keys of a piece.

    Returns: int16, int32 or int64, 1-D. What is pruned already has the largest integer, which is
    the key of no score, and is so never chosen.
    """
    ranking, part = piece.ranking, slice(piece.begin, piece.end)
    if isinstance(ranking.scores, RandomScores):
        made = random_keys(ranking.scores, piece.begin, piece.end, ranking.device)
    else:
        made = ranking.scores[part].to(piece.dtype).view(kernels.BITS[piece.dtype])
        made = made & torch.iinfo(made.dtype).max  # the sign goes
    if ranking.alive is not None:
        made.masked_fill_(~ranking.alive[part], torch.iinfo(made.dtype).max)
    return made


def add_digits(piece: Piece, prefix: int, shift: int, counts: Tensor) -> None:
    """Adds to `counts` the digits at `shift` of the keys whose higher digits are `prefix`.

    counts: int64, 2^16, on the CPU. Those of pieces add up to that of the whole.
    """
    if compiled := piece.compiled():
        compiled.add_digits(prefix, shift, counts)
        return
    found = keys(piece)
    if shift + DIGIT_BITS < torch.iinfo(found.dtype).bits:
        found = found[(found >> (shift + DIGIT_BITS)) == prefix]
        digits = (found >> shift) & ((1 << DIGIT_BITS) - 1)
    else:  # the highest digit: nothing above it, and no sign
        digits = found >> shift
    counts += torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu()


def count_equal(piece: Piece, key: int) -> int:
    """How many keys are `key`."""
    if compiled := piece.compiled():
        return compiled.count_equal(key)
    return int((keys(piece) == key).count_nonzero())


def mark(piece: Piece, key: int, ties: int | None, kept: Tensor) -> int:
    """Writes which units of a piece are kept: those alive above `key`, and ties at it.

    ties: how many of those at the key are pruned, the first ones; None is all.
    kept: bool, 1-D, written to.  Returns: how many are kept.
    """
    if compiled := piece.compiled():
        return compiled.mark(key, ties, kept)
    found = keys(piece)
    torch.gt(found, key, out=kept)
    if ties is not None:
        kept[(found == key).nonzero().view(-1)[ties:]] = True
    if piece.ranking.alive is not None:
        kept &= piece.ranking.alive[piece.begin : piece.end]
    return int(kept.count_nonzero())
