"""The passes over the pieces of tensors, as operations of torch: what every device can do.

Units are ordered by their keys: see keys.py.

A mask is bits: uint8, row-major, lowest bit first, 1 is kept, the last byte padded with 0.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends.keys import BITS, as_keys, picked, signed_bits
from secateur_server.backends.randomness import RandomScores, random_keys
from secateur_server.runtime.context import Found, Item, RequestContext

DIGIT_BITS = 16

# Numbers are added up in parts of so many, whatever a device's pieces are, and the parts in their
# order: so neither device nor threads show.
PART = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Units of a tensor in their order, to be ranked by the absolute value of their scores.

    scores: of any dtype that can be pruned, 1-D; or random ones.  dtype: what they are compared as,
    as of ranked_as; random ones are integers of its bits.
    alive: bits, 0 is pruned already; None is all alive.
    """

    units: int
    scores: Tensor | RandomScores
    dtype: torch.dtype
    alive: Tensor | None


@dataclass(frozen=True)
class Cut:
    """Prune the units with keys below `key`, and the first `ties` of the `equal` ones at it."""

    key: int
    ties: int
    equal: int


@dataclass(frozen=True)
class Split:
    """Of a piece: how many units are above bounds; the keys of those within, and where they are.

    at: int32.
    """

    above: int
    keys: Tensor
    at: Tensor


# Powers that are products, and whose roots too, which all devices compute alike.
EXACT_POWERS = (0.5, 1, 2, 3)

# Bytes that each unit takes of those ranked at once: keys, places, their copies, and a flag.
BYTES_OF_FEW = 48


@dataclass(frozen=True)
class Layout:
    """Where the ones of a mask lie.

    nonzero_slices: for each dimension, how many slices have one.
    most_ones, nonzero_blocks: as of Passes; no blocks under 2 dimensions.
    """

    nonzero_slices: list[int]
    most_ones: list[int]
    nonzero_blocks: list[int]


class Passes:
    """Each pass reads a piece once. A device overrides what it does better, with the same bits."""

    # Elements of a piece, a multiple of 8; and of those that are only looked at, or ranked.
    piece = ranked = 1 << 20
    # Bytes of what has landed that are looked at at once.
    look_bytes = 64 << 20
    # How many of them `map` works on at once.
    threads = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """What `function` makes of each piece, in their order.  Errors: Cancelled."""
        return context.map(function, pieces)

    def room(self, size: int) -> Tensor:
        """Memory of `size` bytes, as uint8."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def land(self, data: memoryview, target: Tensor) -> None:
        """Copies bytes that arrived to the device.  target: uint8, as long."""
        raise NotImplementedError  # each device has a way of its own

    def landed(self, data: memoryview) -> Tensor:
        """Bytes that came, in memory of their own.  data: not empty.  Returns: uint8, flat."""
        target = self.room(len(data))
        self.land(data, target)
        return target

    def landed_all(self, pieces: Iterable[memoryview]) -> Tensor:
        """As landed, of bytes that came in pieces, and not many."""
        return self.landed(memoryview(b"".join(pieces)))

    def pack(self, mask: Tensor) -> Tensor:
        """A mask as bits.  mask: bool, 1-D."""
        padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
        return (padded.to(torch.uint8) << self._places()).sum(1, dtype=torch.uint8)

    def unpack(self, bits: Tensor, count: int) -> Tensor:
        """The first `count` of `bits` as bool."""
        return ((bits.unsqueeze(1) >> self._places()) & 1).to(torch.bool).view(-1)[:count]

    def _places(self) -> Tensor:
        return torch.arange(8, dtype=torch.uint8, device=self.device)

    def lines(self, bits: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """A mask's lines along the second of three dimensions, each as bits in bytes of its own.

        Returns: uint8, (lines, bytes).
        """
        outer, size, inner = sizes
        if inner == 1 and size % 8 == 0:
            return bits.view(outer, size // 8)
        flags = self.unpack(bits, outer * size * inner).view(sizes)
        return self.pack_lines(flags.movedim(1, 2).reshape(-1, size))

    def pack_lines(self, flags: Tensor) -> Tensor:
        """As pack, each line of `flags`, (lines, elements), in bytes of its own."""
        padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8))
        return self.pack(padded.reshape(-1)).view(len(flags), -1)

    def count_ones(self, bits: Tensor) -> int:
        """How many of `bits` are 1."""
        return int(self.unpack(bits, 8 * len(bits)).count_nonzero())

    def extremes(self, values: Tensor) -> tuple[int, int]:
        """The smallest and the largest key of `values`, floating, 1-D, one or more."""
        bits = values.view(BITS[values.dtype])
        smallest, largest = (bits & torch.iinfo(bits.dtype).max).aminmax()
        return int(smallest), int(largest)

    def keys(self, piece: Piece) -> Tensor:
        """The keys of a piece; of what is pruned already the largest integer, no score's key.

        Returns: an integer dtype, 1-D.
        """
        if isinstance(piece.scores, RandomScores):
            keys = random_keys(piece.scores, torch.arange(piece.units, device=self.device))
        else:
            keys = as_keys(piece.scores, piece.dtype)
        if piece.alive is not None:
            keys[~self.unpack(piece.alive, piece.units)] = torch.iinfo(keys.dtype).max
        return keys

    def _living(self, piece: Piece) -> Tensor:
        keys = self.keys(piece)
        return keys if piece.alive is None else keys[keys < torch.iinfo(keys.dtype).max]

    def add_digits(self, piece: Piece, prefix: int, shift: int, counts: Tensor) -> None:
        """Adds to `counts` the digits at `shift` of the keys whose higher digits are `prefix`.

        counts: int64, 2^16, on the device. Those of pieces add up to that of the whole.
        """
        keys = self._living(piece)
        if shift + DIGIT_BITS < torch.iinfo(keys.dtype).bits:
            keys = keys[(keys >> (shift + DIGIT_BITS)) == prefix]
        digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
        counts += torch.bincount(digits, minlength=1 << DIGIT_BITS)

    def count_many_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        """As add_digits, for many prefixes at once, by digits of `width` bits.

        prefixes: ascending, distinct, of the keys' dtype.
        counts: int64, (prefixes, 2^width), on the device.
        """
        digits = self._living(piece) >> shift
        rows = torch.searchsorted(prefixes, digits >> width).clamp(max=len(prefixes) - 1)
        places = (rows << width) + (digits & ((1 << width) - 1))
        places = places[prefixes[rows] == digits >> width]
        counts += torch.bincount(places, minlength=counts.numel()).view_as(counts)

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        """How many keys are below `key`, and how many are `key`."""
        keys = self._living(piece)
        return int((keys < key).count_nonzero()), int((keys == key).count_nonzero())

    def sum_squares(self, piece: Piece, values: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of squares of the values whose keys are at and between cuts, in their order.

        values: as many as units, of any dtype.  cuts: keys, of their dtype, ascending, distinct.
        Returns: float64 on the CPU, at 2j of what is between cut j - 1 and cut j, at 2j + 1 of what
        is at cut j; and how many those are, int64 on the CPU.
        """
        keys, size = self._living(piece), 2 * len(cuts) + 1
        if piece.alive is not None:
            values = picked(values, self.unpack(piece.alive, piece.units))
        at = torch.searchsorted(cuts, keys) + torch.searchsorted(cuts, keys, right=True)
        squares = values.to(torch.float64).square()
        # Of bincounts numpy's alone adds in the order of the elements, on every device.
        sums = np.bincount(at.cpu().numpy(), squares.cpu().numpy(), size)
        return torch.from_numpy(sums), torch.bincount(at, minlength=size).cpu()

    def sample(self, piece: Piece, index: Tensor) -> Tensor:
        """The keys of the units that are alive at `index`, as far as there are.

        index: ascending, below `ranked`.
        """
        if piece.units < self.ranked:
            index = index[: int(torch.searchsorted(index, piece.units))]
        if piece.alive is not None:
            index = index[bits_at(piece.alive, index)]
        return self.keys_at(piece, index)

    def keys_at(self, piece: Piece, index: Tensor) -> Tensor:
        """The keys of the units at `index`."""
        if isinstance(piece.scores, RandomScores):
            return random_keys(piece.scores, index)
        return as_keys(picked(piece.scores, index), piece.dtype)

    def ascending(self, keys: Tensor) -> Tensor:
        """The keys in the order of size."""
        return keys.sort().values

    def kth(self, keys: Tensor, place: int) -> int:
        """The key at `place`, from 1, in the order of size."""
        return int(keys.kthvalue(place).values)

    def rank(self, keys: Tensor, place: int) -> tuple[Cut, Tensor]:
        """The cut that takes the lowest `place` of `keys`, ties by their order.

        Returns: also which keys stay, bool; not those of what is pruned already.
        """
        key = self.kth(keys, place)
        equal = (keys == key).nonzero().view(-1)
        ties = place - int((keys < key).count_nonzero())
        stays = (keys > key) & (keys < torch.iinfo(keys.dtype).max)
        stays[equal[ties:]] = True
        return Cut(key, ties, len(equal)), stays

    def cut_few(
        self,
        context: RequestContext,
        pieces: Sequence[Piece],
        place: int,
        kept: Sequence[Tensor],
    ) -> Cut:
        """Takes the lowest `place` of pieces.  kept: the bits of what stays of each, written to."""
        keys = torch.cat([self.keys(piece) for piece in context.each(pieces)])
        cut, stays = self.rank(keys, place)
        parts = torch.split(stays, [piece.units for piece in pieces])
        for bits, part in zip(kept, parts, strict=True):
            bits.copy_(self.pack(part))
        return cut

    def split(self, piece: Piece, low: int, high: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Writes which units of a piece are kept: those alive at `high` or above.

        kept: bits, written to.
        Returns: the keys in [low, high) that are alive, in their order; and where they are, int32.
        """
        keys = self.keys(piece)
        kept.copy_(self.pack((keys >= high) & (keys < torch.iinfo(keys.dtype).max)))
        at = ((keys >= low) & (keys < high)).nonzero().view(-1)
        return keys[at], at.to(torch.int32)

    def split_all(
        self,
        context: RequestContext,
        pieces: Sequence[Piece],
        low: int,
        high: int,
        kept: Sequence[Tensor],
    ) -> list[Split]:
        """As split, of each piece, all of one dtype.  kept: the bits of each, written to."""

        def split(part: tuple[Piece, Tensor]) -> Split:
            keys, at = self.split(part[0], low, high, part[1])
            return Split(self.count_ones(part[1]), keys, at)

        return self.map(context, split, list(zip(pieces, kept, strict=True)))

    def keep(self, kept: Tensor, at: Tensor, stays: Tensor) -> None:
        """Keeps the units at `at`, int32, that stay, bool.  kept: bits, 0 there; written to."""
        at = at[stays]
        kept.index_add_(0, at >> 3, (1 << (at & 7)).to(torch.uint8))

    def any_along(self, flags: Tensor) -> Tensor:
        """Which of the second dimension's indices have a flag.  flags: bool, 3-D."""
        return flags.any(0).any(1)

    def count_along(self, flags: Tensor) -> int:
        """How many of the second dimension's indices have a flag.  flags: bool, 3-D."""
        return int(self.any_along(flags).count_nonzero())

    def layout(self, bits: Tensor, shape: Sequence[int]) -> Layout:
        """The layout of a mask of one dimension or more, with elements, and not many."""
        flags = self.unpack(bits, math.prod(shape))
        sizes = [around(shape, dim) for dim in range(len(shape))]
        slices = [self.count_along(flags.view(of_dim)) for of_dim in sizes]
        most = self.most_ones(self.lines(bits, sizes[:2][-1]))
        if len(shape) == 1:
            return Layout(slices, most, [])
        matrix = shape[0], len(flags) // shape[0], 1
        return Layout(slices, most, self.nonzero_blocks(self.lines(bits, matrix)))

    def most_ones(self, lines: Tensor) -> list[int]:
        """How many bits are 1 at most, of 2, 4, 8 and 16 side by side.

        lines: as of lines; of each the bytes side by side.
        """
        lines = torch.nn.functional.pad(lines, (0, lines.shape[1] % 2))
        twos = lines - ((lines >> 1) & 0x55)  # each two bits now say how many of them were 1
        fours = (twos & 0x33) + ((twos >> 2) & 0x33)
        eights = (fours & 0x0F) + (fours >> 4)
        by_two = eights.contiguous().view(torch.int16)
        sixteens = (by_two & 0xFF) + (by_two >> 8)
        parts = (twos & 0xAA, fours & 0x0F, fours >> 4, eights, sixteens)
        two, low, high, eight, sixteen = torch.stack([part.max().int() for part in parts]).tolist()
        return [2 if two else min(1, eight), max(low, high), eight, sixteen]

    def nonzero_blocks(self, lines: Tensor) -> list[int]:
        """How many blocks, as high and as wide as 4, 8, 16 and 32 bits, have one that is 1.

        lines: as of most_ones. At the edges blocks are smaller.
        """
        lines = torch.nn.functional.pad(lines, (0, lines.shape[1] % 2))
        by_4 = _joined(_joined(lines, 0), 0)
        by_8 = _joined(by_4, 0)
        by_16 = _joined(_joined(by_8, 0), 1)
        by_32 = _joined(_joined(by_16, 0), 1)
        blocks = (by_4 & 0x0F, by_4 >> 4, by_8, by_16, by_32)
        low, high, *larger = torch.stack([part.count_nonzero() for part in blocks]).tolist()
        return [low + high, *larger]

    def nonzero(self, values: Tensor) -> Tensor:
        """Which of `values` are not zero.  values: 1-D.  Returns: bool."""
        return values != 0

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        """How many of `values` are zero, or not kept.  values: 1-D.  kept: bits."""
        zero = values == 0
        if kept is not None:
            zero |= ~self.unpack(kept, len(values))
        return int(zero.count_nonzero())

    def fold(self, values: Tensor, kept: Tensor) -> None:
        """Sets what is not kept to zero of its own sign.  values: written to.  kept: bits."""
        bits, sign = signed_bits(values)
        torch.where(self.unpack(kept, len(bits)), bits, bits & sign, out=bits)

    def power_sums(self, values: Tensor, first: int, last: int, p: float) -> Tensor | None:
        """The sums of |x|^p by halves of the slices [first, last) along the second dimension.

        values: floating, 3-D, contiguous, with elements.
        Returns: float64; None where they are left to operations of torch.
        """
        return None

    def largest(self, keys: Tensor, n: int) -> Tensor:
        """Which keys of each group are its `n` largest, of equal ones those further on.

        keys: integers, (groups, m, inner), of which a group has the second dimension's.
        Returns: bool, of the same shape.
        """
        ascending = keys.argsort(dim=1, stable=True)
        found = torch.zeros(keys.shape, dtype=torch.bool, device=self.device)
        return found.scatter_(1, ascending[:, max(0, keys.shape[1] - n) :], True)


def around(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """The elements before, along and behind a dimension."""
    dim %= len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def bits_at(bits: Tensor, index: Tensor) -> Tensor:
    """The bits at `index` as bool, in its shape."""
    return ((bits[index >> 3] >> (index & 7)) & 1).to(torch.bool)


def _joined(blocks: Tensor, dim: int) -> Tensor:
    """Two neighbours each along a dimension as one, with the bits of both."""
    if blocks.shape[dim] % 2:
        blocks = torch.nn.functional.pad(blocks, (0, dim, 0, 1 - dim))
    pairs = blocks.reshape(*blocks.shape[:dim], -1, 2, *blocks.shape[dim + 1 :])
    return pairs.select(dim + 1, 0) | pairs.select(dim + 1, 1)
