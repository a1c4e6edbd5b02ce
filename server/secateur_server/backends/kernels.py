"""The kernels of NumbaBackend: each reads its piece once, and stores no keys.

bits: the integers that have the bits of floating scores, 1-D.  unpruned, kept: a bit for each
of them, lowest first; unpruned may be None for all.
largest: the largest integer of the bits' dtype, which `and` takes the sign with. numba makes int64
of it, and several times slower loops, where the result is not turned back to the bits' dtype.
count_zeros and fold take integers as well, which have no bit that is a sign.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import carray, config, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from secateur_server.backends.randomness import GAMMA, MIX_1, MIX_2

F = TypeVar("F", bound=Callable[..., Any])

# Of a digit of few keys: the counts stay in the caches. Of fewer than VERY_FEW keys, to clear and
# to read so many counts would take longer than to read the keys.
FEW_BITS = 13
VERY_FEW = 1 << 12
VERY_FEW_BITS = 8

# Elements whose flags stay in the first-level cache.
BLOCK = 1024
TO_BITS = np.uint64(0x0102040810204080)

# NUMBA_DISABLE_JIT=1: TorchBackend serves, with the same bits.
enabled = not config.DISABLE_JIT  # type: ignore[attr-defined]


def _pointed(context: Any, address: Any) -> Any:
    """Numba's way to read memory by its address."""

    def generated(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generated


_pointer: Any = intrinsic(_pointed)


def compiled(function: F) -> F:
    """Compiles a function when it is first called; its loops run beside other threads."""
    try:
        made: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder to keep what was compiled
        made = njit(nogil=True)(function)
    return cast(F, made)


@compiled
def is_unpruned(unpruned: Any, i: int) -> bool:
    """Whether the unit `i` is not pruned already."""
    return unpruned is None or bool((unpruned[i >> 3] >> (i & 7)) & 1)


@compiled
def extremes(bits: Any, largest: int) -> tuple[int, int]:
    """The smallest and the largest of the keys."""
    low, high = largest, bits.dtype.type(0)
    for i in range(len(bits)):
        key = bits.dtype.type(bits[i] & largest)
        low = min(low, key)
        high = max(high, key)
    return int(low), int(high)


@compiled
def count_top_digits(bits: Any, unpruned: Any, largest: int, shift: int, counts: Any) -> None:
    """Adds to `counts` the digits at `shift`, the highest, of the keys."""
    for i in range(len(bits)):
        if is_unpruned(unpruned, i):
            counts[(bits[i] & largest) >> shift] += 1


@compiled
def count_digits(
    bits: Any, unpruned: Any, largest: int, prefix: int, shift: int, width: int, counts: Any
) -> None:
    """Adds to `counts` the digits at `shift` of the keys whose higher bits are `prefix`."""
    low = (1 << width) - 1
    for i in range(len(bits)):
        key = bits[i] & largest
        if key >> (shift + width) == prefix and is_unpruned(unpruned, i):
            counts[(key >> shift) & low] += 1


@compiled
def sample(bits: Any, unpruned: Any, largest: int, index: Any, found: Any) -> int:
    """Writes to `found` the unpruned keys at `index`, ascending.  Returns: how many."""
    count = 0
    for i in index:
        if i < len(bits) and is_unpruned(unpruned, i):
            found[count] = bits[i] & largest
            count += 1
    return count


@compiled
def split(
    bits: Any, unpruned: Any, largest: int, low: int, high: int, kept: Any, found: Any, at: Any
) -> int:
    """Writes to `kept` which units are unpruned and at `high` or above, in bits.

    Writes the unpruned keys in [low, high) to `found`, their places to `at`.
    Returns: how many.
    """
    count = 0
    above, within = np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
    above_by_8, within_by_8 = above.view(np.uint64), within.view(np.uint64)
    for begin in range(0, len(bits), BLOCK):
        block = bits[begin : begin + BLOCK]
        above[len(block) :] = 0
        within[len(block) :] = 0
        for i in range(len(block)):  # a loop of its own: it is vectorized
            key = bits.dtype.type(block[i] & largest)
            above[i] = key >= high
            within[i] = (key >= low) & (key < high)
        for j in range((len(block) + 7) // 8):
            candidates = 0xFF if unpruned is None else unpruned[begin // 8 + j]
            # Eight flags of a byte each to eight bits: the product has them in its highest byte.
            eight = (above_by_8[j] * TO_BITS) >> np.uint64(56)
            kept[begin // 8 + j] = np.uint8(eight) & candidates
            if within_by_8[j]:
                for i in range(8 * j, 8 * j + 8):
                    if within[i] and (candidates >> (i & 7)) & 1:
                        found[count] = block[i] & largest
                        at[count] = begin + i
                        count += 1
    return count


@compiled
def split_many(
    pieces: Any, largest: int, low: int, high: int, kept: Any, found: Any, at: Any
) -> tuple[int, int]:
    """As split, of pieces one after the other: a call from Python takes as long as many units do.

    pieces: int64, a row each: the addresses of bits, and of unpruned, 0 for None; units.
    kept, found: of all pieces.  at: places in `kept`.
    Returns: how many units are kept, and how many are found.
    """
    begin = count = 0
    for p in range(len(pieces)):
        units = pieces[p, 2]
        size = (units + 7) // 8
        bits = carray(_pointer(pieces[p, 0]), units, found.dtype)
        into = kept[begin : begin + size], found[count:], at[count:]
        if pieces[p, 1] == 0:
            within = split(bits, None, largest, low, high, *into)
        else:
            unpruned = carray(_pointer(pieces[p, 1]), size, np.uint8)
            within = split(bits, unpruned, largest, low, high, *into)
        for i in range(count, count + within):
            at[i] += 8 * begin
        begin += size
        count += within
    return count_ones(kept), count


@compiled
def rank(keys: Any, cut: int, largest: int, place: int, kept: Any) -> tuple[int, int]:
    """Writes which keys are kept when the lowest `place`, up to the cut, are pruned in order.

    Returns: how many at the cut are pruned, and of how many.
    """
    below, equal = 0, 0
    for i in range(len(keys)):
        kept[i] = (keys[i] > cut) & (keys[i] < largest)
        below += keys[i] < cut
        equal += keys[i] == cut
    ties, seen = place - below, 0
    if ties < equal:
        for i in range(len(keys)):
            if keys[i] == cut:
                kept[i] = seen >= ties
                seen += 1
    return ties, equal


@compiled
def find_digit(counts: Any, place: int) -> tuple[int, int]:
    """The digit of the place-th that was counted, from 1; its place among those of the digit."""
    digit = 0
    while place > counts[digit]:
        place -= counts[digit]
        digit += 1
    return digit, place


@compiled
def cut_few(
    bits: Any, unpruned: Any, largest: int, place: int, kept: Any, found: Any, at: Any
) -> tuple[int, int, int]:
    """Writes to `kept` which units are kept when the lowest `place` are pruned, ties in order.

    found, at: as of split, to work in.
    Returns: the key at the place, how many at it are pruned, and of how many.
    """
    width = FEW_BITS if len(bits) >= VERY_FEW else VERY_FEW_BITS
    counts = np.zeros(1 << width, np.int64)
    shift = 8 * bits.itemsize - 1 - width
    for i in range(len(bits)):
        if is_unpruned(unpruned, i):
            counts[(bits[i] & largest) >> shift] += 1
    cut, place = find_digit(counts, place)
    equal = counts[cut]
    low, high = bits.dtype.type(cut << shift), bits.dtype.type(largest)
    if cut + 1 < 1 << width:  # else it is beyond the largest integer
        high = bits.dtype.type((cut + 1) << shift)
    within = split(bits, unpruned, largest, low, high, kept, found, at)
    while shift > 0:  # the digits of the cut above `shift` are known
        step = min(width, shift)
        counts[:] = 0
        for i in range(within):
            if found[i] >> shift == cut:
                counts[(found[i] >> (shift - step)) & ((1 << step) - 1)] += 1
        digit, place = find_digit(counts, place)
        cut, shift, equal = cut << step | digit, shift - step, counts[digit]
    seen = 0
    for i in range(within):
        seen += found[i] == cut
        if found[i] > cut or (found[i] == cut and seen > place):
            kept[at[i] >> 3] |= 1 << (at[i] & 7)
    return cut, place, equal


@compiled
def keep(kept: Any, at: Any, flags: Any) -> None:
    """Sets the bits at those of the places `at` that are flagged."""
    for i in range(len(at)):
        if flags[i]:
            kept[at[i] >> 3] |= 1 << (at[i] & 7)


@compiled
def count_zeros(bits: Any, kept: Any, largest: int) -> int:
    """How many scores are zero, or not kept.  largest: -1 for integers."""
    count = 0
    if kept is None:
        for i in range(len(bits)):
            count += bits.dtype.type(bits[i] & largest) == 0
    else:
        for i in range(len(bits)):
            count += (bits.dtype.type(bits[i] & largest) == 0) | (
                ((kept[i >> 3] >> (i & 7)) & 1) == 0
            )
    return count


@compiled
def count_ones(bits: Any) -> int:
    """How many bits of bytes are 1."""
    count = 0
    for byte in bits:
        pairs = byte - ((byte >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        count += (fours + (fours >> 4)) & 0x0F
    return count


@compiled
def fold(bits: Any, kept: Any, sign: int) -> None:
    """Leaves of what is not kept the sign alone.  sign: its bit; 0 for integers."""
    for i in range(len(bits)):  # without a branch, which random masks make slow
        bits[i] &= bits.dtype.type(-((np.int64(kept[i >> 3]) >> (i & 7)) & 1) | sign)


@compiled
def random_bits(state: int, begin: int, bits: Any) -> None:
    """Writes the keys of random scores, as randomness.random_keys, from the unit `begin` on."""
    for i in range(len(bits)):
        z = (begin + 1 + i) * GAMMA + state
        z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1
        z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
        z ^= (z >> 31) & ((1 << 33) - 1)
        bits[i] = (z >> 34) & ((1 << 30) - 1)


@compiled
def raise_to(values: Any, p: float) -> None:
    """Replaces float64 values by |x|^p.  p: 0.5, 1, 2 or 3."""
    for i in range(len(values)):
        values[i] = abs(values[i])
    if p == 0.5:
        for i in range(len(values)):
            values[i] = np.sqrt(values[i])
    elif p != 1:
        for i in range(len(values)):
            square = values[i] * values[i]
            values[i] = square if p == 2 else square * values[i]


@compiled
def sum_rows(rows: Any, p: float, halves: Any, sums: Any) -> None:
    """Writes the sums of |x|^p of each row, added by halves as pieces.row_sums adds.

    halves: float64, as long as a row, to work in.
    """
    for r in range(len(rows)):
        for i in range(len(halves)):
            halves[i] = rows[r, i]  # float64 from here on
        raise_to(halves, p)
        left = len(halves)
        while left > 1:
            half = left // 2
            for i in range(half):
                halves[i] += halves[half + i]
            if left % 2:
                halves[0] += halves[left - 1]
            left = half
        sums[r] = halves[0]


@compiled
def sum_columns(values: Any, first: int, p: float, halves: Any, sums: Any) -> None:
    """As sum_rows, of slices from `first` on along the second dimension of three.

    halves: float64, (elements of a slice, slices): what is one operation for many slices.
    """
    outer, size, inner = values.shape
    flat = values.reshape(outer, size * inner)
    for o in range(outer):
        part = flat[o, first * inner : (first + len(sums)) * inner]
        if inner == 1:  # columns of a matrix: the compiler vectorizes what it sees is contiguous
            for i in range(len(sums)):
                halves[o, i] = part[i]
        else:
            for i in range(len(sums)):
                for k in range(inner):
                    halves[o * inner + k, i] = part[i * inner + k]
    raise_to(halves.reshape(-1), p)
    left = len(halves)
    while left > 1:
        half = left // 2
        for j in range(half):
            for i in range(len(sums)):
                halves[j, i] += halves[half + j, i]
        if left % 2:
            for i in range(len(sums)):
                halves[0, i] += halves[left - 1, i]
        left = half
    sums[:] = halves[0]
