"""The kernels of TritonBackend: each reads its piece once.

torch has an operation for every step of a loop, and each reads and writes the GPU's memory. Triton
comes with torch's builds for CUDA; what needs it is imported where there is a GPU.

bits: the integers that have the bits of scores, 1-D; not read where the scores are random.
unpruned, kept: bits, lowest first; `unpruned` is not read where all units are.
largest: the largest integer of the bits' dtype, which `and` takes the sign with.
state, begin: of random scores.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import triton
import triton.language as tl

from secateur_server.backends import randomness

F = TypeVar("F", bound=Callable[..., Any])

# Bytes of a mask that one program writes, and the units that are theirs.
BYTES = tl.constexpr(512)
UNITS = tl.constexpr(8 * BYTES.value)

_GAMMA = tl.constexpr(randomness.GAMMA)
_MIX_1 = tl.constexpr(randomness.MIX_1)
_MIX_2 = tl.constexpr(randomness.MIX_2)


def _compiled(function: F) -> F:
    # Nothing is compiled anew because a number happens to be 1, or a multiple of 16, or because a
    # mask begins at one.
    names = {"units", "largest", "low", "high", "state", "begin", "prefix", "shift", "width"}
    numbers = [name for name in function.__code__.co_varnames if name in names]
    masks = [
        name for name in ("unpruned", "kept", "within") if name in function.__code__.co_varnames
    ]
    switches = {"do_not_specialize": numbers, "do_not_specialize_on_alignment": masks}
    return cast(F, triton.jit(function, **switches))


@_compiled
def _keys(bits, unit, units, is_whole, largest, state, begin, is_random):
    """The keys of `unit`, of which all are below `units` where it is whole.

    Random ones are as of randomness.random_keys.
    """
    if is_random:
        z = (unit.to(tl.int64) + begin + 1) * _GAMMA + state
        z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_1
        z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_2
        z = z ^ ((z >> 31) & ((1 << 33) - 1))
        keys = ((z >> 34) & ((1 << 30) - 1)).to(tl.int32)
    elif is_whole:  # without a mask loads are of 16 bytes
        keys = tl.load(bits + unit) & largest
    else:
        keys = tl.load(bits + unit, mask=unit < units, other=0) & largest
    return keys


@_compiled
def _ones(words):
    """How many bits are 1, of the two lower bytes of each int32: of each byte, in its place."""
    twos = words - ((words >> 1) & 0x5555)
    fours = (twos & 0x3333) + ((twos >> 2) & 0x3333)
    return (fours + (fours >> 4)) & 0x0F0F


@_compiled
def split(
    bits,
    unpruned,
    kept,
    within,
    counts,
    units,
    largest,
    low,
    high,
    state,
    begin,
    is_random: tl.constexpr,
    are_all: tl.constexpr,
):
    """Writes which unpruned units are at `high` or above to `kept`, in [low, high) to `within`.

    counts: int64, 2: how many those are is added.
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    byte = tl.arange(0, BYTES)
    place = tl.arange(0, 8)[None, :]
    left = tl.minimum(units - first * 8, UNITS).to(tl.int32)
    unit = first * 8 + (byte[:, None] * 8 + place)
    keys = _keys(bits, unit, units, left == UNITS, largest, state, begin, is_random)
    # Both answers in one number, so that eight of them are added up at once.
    word = tl.where(keys >= high, 1 << place, tl.where(keys >= low, 256 << place, 0))
    both = tl.sum(word, 1)
    of_byte = tl.minimum(tl.maximum(left - byte * 8, 0), 8)
    candidates = (1 << of_byte) - 1
    if not are_all:
        candidates = candidates & tl.load(unpruned + first + byte, mask=of_byte > 0, other=0).to(
            tl.int32
        )
    both = both & (candidates | (candidates << 8))
    tl.store(kept + first + byte, both.to(tl.uint8), mask=of_byte > 0)
    tl.store(within + first + byte, (both >> 8).to(tl.uint8), mask=of_byte > 0)
    ones = _ones(both)
    total = tl.sum((ones & 0xFF) | ((ones >> 8) << 16))
    tl.atomic_add(counts, (total & 0xFFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, (total >> 16).to(tl.int64), sem="relaxed")


@_compiled
def count_digits(
    bits,
    unpruned,
    counts,
    units,
    largest,
    prefix,
    shift,
    width,
    state,
    begin,
    is_random: tl.constexpr,
    are_all: tl.constexpr,
):
    """Adds to `counts` the digits at `shift` of the keys whose higher bits are `prefix`."""
    first = tl.program_id(0).to(tl.int64) * UNITS
    unit = first + tl.arange(0, UNITS)
    is_whole = first + UNITS <= units
    keys = _keys(bits, unit, units, is_whole, largest, state, begin, is_random)
    is_counted = unit < units
    if not are_all:
        byte = tl.load(unpruned + (unit >> 3), mask=is_counted, other=0).to(tl.int32)
        is_counted = is_counted & (((byte >> (unit & 7).to(tl.int32)) & 1) == 1)
    digits = keys >> shift
    is_counted = is_counted & ((digits >> width) == prefix)
    place = digits & ((1 << width) - 1)
    tl.atomic_add(counts + place, tl.full([UNITS], 1, tl.int64), mask=is_counted, sem="relaxed")


@_compiled
def extremes(bits, found, units, largest):
    """Lowers found[0] to the smallest of the keys, and raises found[1] to the largest."""
    first = tl.program_id(0).to(tl.int64) * UNITS
    unit = first + tl.arange(0, UNITS)
    is_whole = first + UNITS <= units
    keys = _keys(bits, unit, units, is_whole, largest, 0, 0, False).to(tl.int64)
    tl.atomic_min(found, tl.min(tl.where(unit < units, keys, largest)), sem="relaxed")
    tl.atomic_max(found + 1, tl.max(keys), sem="relaxed")


@_compiled
def count_ones(bits, count, units):
    """Adds to `count` how many bits of bytes are 1.  units: the bytes."""
    byte = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    ones = _ones(tl.load(bits + byte, mask=byte < units, other=0).to(tl.int32))
    tl.atomic_add(count, tl.sum(ones).to(tl.int64), sem="relaxed")
