"""Kernels that select within each row of a matrix, as those of kernels.py.

A histogram of few digits has the place in most rows: its digits lie below the largest key, where
the keys of weights lie, and all keys far below it count as the last one.
"""

from typing import Any

import numpy as np

from secateur_server.backends.kernels import compiled, find_digit, is_unpruned, split

# Digits of the histogram: to clear and to read it takes no longer than to read a row.
DIGITS = 256
DIGIT_BITS = 8
# Bits of a key, after those of an exponent, that make a digit: 32 digits for each power of two.
FINE_BITS = 5
# So few keys are sorted sooner than counted.
FEW_KEYS = 24


@compiled
def cut_rows(bits: Any, unpruned: Any, largest: int, counts: Any, kept: Any) -> None:
    """Prunes the `counts[r]` lowest units of each row r, ties in order.

    bits: of all rows, each as long.  counts: int64; at most the unpruned units of each row.
    kept: bits of the units that are kept, written to.
    """
    width = len(bits) // len(counts)
    found, at = np.empty(width, bits.dtype), np.empty(width, np.int32)
    digits, counted = np.empty(width, np.uint8), np.empty(DIGITS, np.int32)
    candidates = np.empty((width + 7) // 8, np.uint8)
    into = np.empty((width + 7) // 8, np.uint8)
    if width % 8:
        kept[:] = 0
    for r in range(len(counts)):
        begin, end = r * width, (r + 1) * width
        if width % 8 == 0:
            into = kept[begin >> 3 : end >> 3]
        if unpruned is None:
            scratch = found, at, digits, counted
            cut_row(bits[begin:end], None, largest, counts[r], into, *scratch)
        else:
            copy_bits(unpruned, begin, width, candidates)
            scratch = found, at, digits, counted
            cut_row(bits[begin:end], candidates, largest, counts[r], into, *scratch)
        if width % 8:
            paste_bits(into, begin, kept)


@compiled
def cut_row(
    bits: Any,
    unpruned: Any,
    largest: int,
    place: int,
    kept: Any,
    found: Any,
    at: Any,
    digits: Any,
    counted: Any,
) -> None:
    """Writes the bits of the units of a row that are kept.

    found, at: as of split.  digits: uint8, for each unit; counted: DIGITS numbers; to work in.
    """
    if place == 0:
        split(bits, unpruned, largest, bits.dtype.type(0), bits.dtype.type(0), kept, found, at)
        return
    low, high, place = window(bits, unpruned, largest, place, digits, counted)
    low, high = bits.dtype.type(low), bits.dtype.type(high)  # else they compare as int64
    within = split(bits, unpruned, largest, low, high, kept, found, at)
    cut, ties = kth(found[:within], place, counted)
    for i in range(within):
        if found[i] > cut or (found[i] == cut and ties <= 0):
            kept[at[i] >> 3] |= 1 << (at[i] & 7)
        ties -= found[i] == cut


@compiled
def window(
    bits: Any, unpruned: Any, largest: int, place: int, digits: Any, counted: Any
) -> tuple[int, int, int]:
    """The range [low, high) of the place-th key, from 1, and its place among those in it."""
    shift = digit_shift(8 * bits.itemsize)
    most = bits.dtype.type(0)
    for i in range(len(bits)):  # of pruned units too: it is a bound
        most = max(most, bits.dtype.type(bits[i] & largest))
    first = bits.dtype.type((np.int64(most) >> shift) - (DIGITS - 1))  # key of the digit 0, or less
    for i in range(len(bits)):  # a loop of its own: it is vectorized
        key = bits.dtype.type(bits[i] & largest)
        digit = bits.dtype.type(bits.dtype.type(key >> shift) - first)
        digits[i] = np.uint8(max(digit, bits.dtype.type(0)))
    counted[:] = 0
    for i in range(len(bits)):
        if is_unpruned(unpruned, i):
            counted[digits[i]] += 1
    digit, place = find_digit(counted, place)
    low = (np.int64(first) + digit) << shift if digit else 0
    # Above the highest digit there is no key; its end may be beyond the integers.
    high = (np.int64(first) + digit + 1) << shift if digit < DIGITS - 1 else largest
    return int(low), int(high), int(place)


@compiled
def digit_shift(bits: int) -> int:
    """The bits of a key below the digit: of float16, float32 and float64."""
    return (10 if bits == 16 else 23 if bits == 32 else 52) - FINE_BITS


@compiled
def kth(keys: Any, place: int, counts: Any) -> tuple[int, int]:
    """The place-th key, from 1, and how many of those that equal it are up to the place."""
    if len(keys) <= FEW_KEYS:
        return kth_of_few(keys, place)
    lowest, highest = keys.min(), keys.max()
    shift = 0  # the keys have the same bits above it
    while shift < 64 and np.int64(lowest) >> shift != np.int64(highest) >> shift:
        shift += DIGIT_BITS
    cut = np.int64(lowest) >> shift if shift < 64 else 0
    while shift > 0:
        counts[:] = 0
        for i in range(len(keys)):
            if shift == 64 or np.int64(keys[i]) >> shift == cut:
                counts[(np.int64(keys[i]) >> (shift - DIGIT_BITS)) & (DIGITS - 1)] += 1
        digit, place = find_digit(counts, place)
        cut, shift = cut << DIGIT_BITS | digit, shift - DIGIT_BITS
    return int(cut), int(place)


@compiled
def kth_of_few(keys: Any, place: int) -> tuple[int, int]:
    """As kth, by sorting."""
    ascending = keys.copy()
    for i in range(1, len(ascending)):
        key, j = ascending[i], i
        while j > 0 and ascending[j - 1] > key:
            ascending[j] = ascending[j - 1]
            j -= 1
        ascending[j] = key
    cut, ties = np.int64(ascending[place - 1]), 0
    for i in range(place):
        ties += ascending[i] == cut
    return int(cut), ties


@compiled
def copy_bits(bits: Any, begin: int, count: int, into: Any) -> None:
    """Copies `count` bits from the bit `begin` on; the last byte is padded with 0."""
    first, shift = begin >> 3, begin & 7
    for j in range(len(into)):
        byte = np.int64(bits[first + j]) >> shift
        if shift and first + j + 1 < len(bits):
            byte |= np.int64(bits[first + j + 1]) << (8 - shift)
        into[j] = byte & 0xFF
    if count & 7:
        into[-1] &= (1 << (count & 7)) - 1


@compiled
def paste_bits(bits: Any, begin: int, into: Any) -> None:
    """Writes the bits of bytes from the bit `begin` on, over bits that are 0."""
    first, shift = begin >> 3, begin & 7
    for j in range(len(bits)):
        byte = np.int64(bits[j]) << shift
        into[first + j] |= byte & 0xFF
        if byte >> 8:
            into[first + j + 1] |= byte >> 8
