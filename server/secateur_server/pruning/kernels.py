"""The passes over keys on a CPU, compiled: each reads its piece once, and stores no keys.

torch needs an operation for every step of a pass, each of which writes what the next one reads:
0.6 s for the five passes of a global selection among 100 M float32 on two cores, where these need
0.2 s. They need numba (secateur[fast]); without it torch's operations do the same, bit for bit.

bits: the integers that have the bits of floating scores, 1-D.  alive: bool, or None for all.
largest: the largest integer of the bits' dtype, which `and` takes the sign with.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# The integers that have the bits of a floating dtype.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

# The constants of SplitMix64, as int64.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)

njit: Any = None
with suppress(ImportError):
    from numba import njit

enabled = njit is not None


def _compiled(function: F) -> F:
    if njit is None:
        return function
    try:
        compiled: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to keep what was compiled
        compiled = njit(nogil=True)(function)
    return cast(F, compiled)


@_compiled
def count_top_digits(bits: Any, alive: Any, largest: int, shift: int, counts: Any) -> None:
    """Adds to `counts` the digits at `shift`, the highest, of the keys."""
    for i in range(len(bits)):
        if alive is None or alive[i]:
            counts[(bits[i] & largest) >> shift] += 1


@_compiled
def count_digits(bits: Any, alive: Any, largest: int, prefix: int, shift: int, counts: Any) -> None:
    """Adds to `counts` the digits at `shift` of the keys whose higher digits are `prefix`."""
    for i in range(len(bits)):
        key = bits[i] & largest
        if key >> (shift + 16) == prefix and (alive is None or alive[i]):
            counts[(key >> shift) & 0xFFFF] += 1


# Where all are alive the loops stand for themselves: they are vectorized.
@_compiled
def count_equal(bits: Any, alive: Any, largest: int, cut: int) -> int:
    """How many keys are the cut."""
    count = 0
    if alive is None:
        for i in range(len(bits)):
            count += (bits[i] & largest) == cut
    else:
        for i in range(len(bits)):
            count += ((bits[i] & largest) == cut) & alive[i]
    return count


@_compiled
def mark_above(bits: Any, alive: Any, largest: int, cut: int, kept: Any) -> int:
    """Keeps what is alive and above the cut.  Returns: how many."""
    count = 0
    if alive is None:
        for i in range(len(bits)):
            keep = (bits[i] & largest) > cut
            kept[i] = keep
            count += keep
    else:
        for i in range(len(bits)):
            keep = ((bits[i] & largest) > cut) & alive[i]
            kept[i] = keep
            count += keep
    return count


@_compiled
def mark_but_ties(bits: Any, alive: Any, largest: int, cut: int, ties: int, kept: Any) -> int:
    """As mark_above, and keeps the ties at the cut but for the first `ties`."""
    count = 0
    for i in range(len(bits)):
        key = bits[i] & largest
        keep = key >= cut and (alive is None or alive[i])
        if keep and key == cut and ties > 0:
            ties -= 1
            keep = False
        kept[i] = keep
        count += keep
    return count


@_compiled
def count_zeros(bits: Any, alive: Any, largest: int) -> int:
    """How many scores are zero, or not alive."""
    count = 0
    if alive is None:
        for i in range(len(bits)):
            count += (bits[i] & largest) == 0
    else:
        for i in range(len(bits)):
            count += ((bits[i] & largest) == 0) | (not alive[i])
    return count


@_compiled
def random_bits(state: int, begin: int, bits: Any) -> None:
    """Writes the keys of random scores, as score.random_keys, from the unit `begin` on."""
    for i in range(len(bits)):
        z = (begin + 1 + i) * GAMMA + state
        z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1
        z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
        z ^= (z >> 31) & ((1 << 33) - 1)
        bits[i] = (z >> 34) & ((1 << 30) - 1)


@_compiled
def sum_powers(rows: Any, squares: bool, halves: Any, sums: Any) -> None:
    """Writes the sums of |x| or of x^2 of each row, added by halves as score._row_sums adds.

    halves: float64, as long as a row, to work in.
    """
    for r in range(len(rows)):
        row = rows[r]
        for i in range(len(row)):
            halves[i] = row[i]  # float64 from here on
        if squares:
            for i in range(len(row)):
                halves[i] *= halves[i]
        else:
            for i in range(len(row)):
                halves[i] = abs(halves[i])
        left = len(row)
        while left > 1:
            half = left // 2
            for i in range(half):
                halves[i] += halves[half + i]
            if left % 2:
                halves[0] += halves[left - 1]
            left = half
        sums[r] = halves[0]


@dataclass(frozen=True)
class Piece:
    """Scores of units, and which are alive, as arrays on their memory."""

    bits: Any
    alive: Any

    def _of_bits(self, integer: int) -> Any:
        """An integer in the dtype of the bits: mixed ones would be compared as int64."""
        return self.bits.dtype.type(integer)

    def _largest(self) -> Any:
        return self._of_bits((1 << (8 * self.bits.itemsize - 1)) - 1)

    def add_digits(self, prefix: int, shift: int, counts: Tensor) -> None:
        """As passes.add_digits."""
        if shift + 16 == 8 * self.bits.itemsize:
            count_top_digits(self.bits, self.alive, self._largest(), shift, counts.numpy())
        else:
            count_digits(self.bits, self.alive, self._largest(), prefix, shift, counts.numpy())

    def count_equal(self, key: int) -> int:
        """As passes.count_equal."""
        return int(count_equal(self.bits, self.alive, self._largest(), self._of_bits(key)))

    def mark(self, key: int, ties: int | None, kept: Tensor) -> int:
        """As passes.mark."""
        cut, largest = self._of_bits(key), self._largest()
        if ties == 0:  # what is at the cut stays: it is above the integer before
            cut, ties = self._of_bits(key - 1), None
        if ties is None:
            return int(mark_above(self.bits, self.alive, largest, cut, kept.numpy()))
        return int(mark_but_ties(self.bits, self.alive, largest, cut, ties, kept.numpy()))

    def count_zeros(self) -> int:
        """How many scores are zero, or not alive."""
        return int(count_zeros(self.bits, self.alive, self._largest()))


def piece_of(scores: Tensor, alive: Tensor | None) -> Piece | None:
    """A piece for the compiled passes; None where they do not take it.

    scores: floating, 1-D.  alive: bool.
    """
    if not enabled or scores.device.type != "cpu":
        return None
    bits = scores.contiguous().view(BITS[scores.dtype]).numpy()
    return Piece(bits, None if alive is None else alive.numpy())


def power_sums(rows: Tensor, p: int) -> Tensor | None:
    """The sums of |x|^p of each row, in float64; None where the compiled pass does not take them.

    rows: floating, 2-D, with a column or more.  p: 1 or 2.
    """
    if not enabled or rows.device.type != "cpu" or not rows.is_contiguous():
        return None  # torch is fast in turning columns to float64, and slow in copying them
    if rows.dtype != torch.float64:  # numba has no half precision
        rows = rows.to(torch.float32)
    sums = torch.empty(len(rows), dtype=torch.float64)
    halves = torch.empty(rows.shape[1], dtype=torch.float64)
    sum_powers(rows.numpy(), p == 2, halves.numpy(), sums.numpy())
    return sums


def random_piece(state: int, begin: int, end: int, alive: Tensor | None) -> Piece | None:
    """A piece of random scores for the compiled passes; None where there are none."""
    if not enabled:
        return None
    bits = torch.empty(end - begin, dtype=torch.int32).numpy()
    random_bits(state, begin, bits)
    return Piece(bits, None if alive is None else alive.numpy())
