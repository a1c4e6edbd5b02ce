"""The reference backend: operations of torch, on any device."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur_server.backends.keys import BITS, picked, signed_bits
from secateur_server.backends.pieces import (
    EXACT_POWERS,
    Batch,
    Cut,
    Ints,
    Layouts,
    Piece,
    Split,
    Stored,
    around,
    bits_at,
    row_sums,
)
from secateur_server.backends.pinned import PinnedCopies
from secateur_server.backends.protocol import Backend
from secateur_server.backends.randomness import RandomScores, random_keys
from secateur_server.runtime.context import Found, Item, RequestContext

# A launch on a GPU takes as long as millions of elements do; the temporaries of a piece are up to
# 32 bytes for each.
_PIECES = {"cpu": 1 << 20, "cuda": 1 << 24}


class TorchBackend(Backend):
    """A backend overrides what it does better, with the same bits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = PinnedCopies(device) if device.type == "cuda" else None

    @property
    def piece(self) -> int:
        return _PIECES[self.device.type]

    @property
    def ranked(self) -> int:
        return _PIECES[self.device.type]

    @property
    def batch(self) -> int:
        return self.piece

    @property
    def scanned(self) -> int:
        # What has just arrived is in a CPU's cache.
        return 64 << 20 if self.device.type == "cuda" else 1

    @property
    def threads(self) -> int:
        return 1

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        return context.map(function, pieces)

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def receive(self, data: memoryview, target: Tensor) -> None:
        if self._pinned is not None:
            self._pinned.copy(data, target)
        else:
            np.copyto(target.numpy(), np.frombuffer(data, np.uint8))

    def pack(self, flags: Tensor) -> Tensor:
        padded = pad(flags, (0, -flags.shape[-1] % 8)).reshape(*flags.shape[:-1], -1, 8)
        return (padded.to(torch.uint8) << self._places()).sum(-1, dtype=torch.uint8)

    def unpack(self, bits: Tensor, count: int) -> Tensor:
        return ((bits.unsqueeze(1) >> self._places()) & 1).to(torch.bool).view(-1)[:count]

    def _places(self) -> Tensor:
        return torch.arange(8, dtype=torch.uint8, device=self.device)

    def count_ones(self, bits: Tensor) -> int:
        return int(self.unpack(bits, 8 * len(bits)).count_nonzero())

    def extremes(self, values: Tensor) -> tuple[int, int]:
        bits = values.view(BITS[values.dtype])
        smallest, largest = (bits & torch.iinfo(bits.dtype).max).aminmax()
        return int(smallest), int(largest)

    def keys(self, piece: Piece) -> Tensor:
        keys = piece.scores.keys(piece.dtype, piece.units, self._random_keys)
        if piece.unpruned is not None:
            keys[~self.unpack(piece.unpruned, piece.units)] = torch.iinfo(keys.dtype).max
        return keys

    def _random_keys(self, scores: RandomScores, units: int) -> Tensor:
        return random_keys(scores, torch.arange(units, device=self.device))

    def _unpruned_keys(self, piece: Piece) -> Tensor:
        keys = self.keys(piece)
        return keys if piece.unpruned is None else keys[keys < torch.iinfo(keys.dtype).max]

    def count_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        prefixes, digits = prefixes.to(self.device), self._unpruned_keys(piece) >> shift
        rows = torch.searchsorted(prefixes, digits >> width).clamp(max=len(prefixes) - 1)
        places = (rows << width) + (digits & ((1 << width) - 1))
        places = places[prefixes[rows] == digits >> width]
        counts += torch.bincount(places, minlength=counts.numel()).view_as(counts)

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        keys = self._unpruned_keys(piece)
        return int((keys < key).count_nonzero()), int((keys == key).count_nonzero())

    def sum_squares(self, piece: Piece, values: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        keys, size = self._unpruned_keys(piece), 2 * len(cuts) + 1
        if piece.unpruned is not None:
            values = picked(values, self.unpack(piece.unpruned, piece.units))
        at = torch.searchsorted(cuts, keys) + torch.searchsorted(cuts, keys, right=True)
        squares = values.to(torch.float64).square()
        # Of bincounts numpy's alone adds in the order of the elements, on every device.
        sums = np.bincount(at.cpu().numpy(), squares.cpu().numpy(), size)
        return torch.from_numpy(sums), torch.bincount(at, minlength=size).cpu()

    def sample(self, piece: Piece, index: Tensor) -> Tensor:
        if piece.units < self.ranked:
            index = index[: int(torch.searchsorted(index, piece.units))]
        if piece.unpruned is not None:
            index = index[bits_at(piece.unpruned, index)]
        return piece.scores.keys_at(piece.dtype, index)

    def ascending(self, keys: Tensor) -> Tensor:
        return keys.sort().values

    def kth(self, keys: Tensor, place: int) -> int:
        # torch's kthvalue uses one of a GPU's hundred multiprocessors.
        return int(self.ascending(keys)[place - 1])

    def rank(self, keys: Tensor, place: int) -> tuple[Cut, Tensor]:
        key = self.kth(keys, place)
        equal = (keys == key).nonzero().view(-1)
        ties = place - int((keys < key).count_nonzero())
        kept = (keys > key) & (keys < torch.iinfo(keys.dtype).max)
        kept[equal[ties:]] = True
        return Cut(key, ties, len(equal)), kept

    def split(self, pieces: Sequence[Piece], low: int, high: int) -> Split:
        parts, begin = [], 0
        for piece in pieces:
            keys = self.keys(piece)
            bits = self.pack((keys >= high) & (keys < torch.iinfo(keys.dtype).max))
            at = ((keys >= low) & (keys < high)).nonzero().view(-1)
            parts.append((bits, keys[at], at + 8 * begin))
            begin += len(bits)
        kept, found, places = map(torch.cat, zip(*parts, strict=True))
        return Split(kept, self.count_ones(kept), found, places)

    def keep(self, kept: Tensor, at: Tensor, flags: Tensor) -> None:
        at = at[flags]
        kept.index_add_(0, at >> 3, (1 << (at & 7)).to(torch.uint8))

    def cut_few(
        self, context: RequestContext, pieces: Sequence[Piece], place: int
    ) -> tuple[Cut, Tensor]:
        keys = torch.cat([self.keys(piece) for piece in context.each(pieces)])
        cut, flags = self.rank(keys, place)
        parts = torch.split(flags, [piece.units for piece in pieces])
        return cut, torch.cat([self.pack(part) for part in parts])

    def cut_each(self, batch: Batch, counts: Ints) -> tuple[Tensor, Ints]:
        kept, cuts = batch.unpruned.clone(), np.full((len(counts), 3), (-1, 0, 0))
        for index in counts.nonzero()[0]:
            begin, units = int(batch.begins[index]), int(batch.units[index])
            scores = Stored(batch.bits[begin : begin + units].view(batch.dtype))
            bits = kept[begin // 8 : (begin + units + 7) // 8]
            keys = self.keys(Piece(units, scores, batch.dtype, bits))
            cut, flags = self.rank(keys, int(counts[index]))
            bits.copy_(self.pack(flags))
            cuts[index] = cut.key, cut.ties, cut.equal
        return kept, cuts

    def cut_rows(self, piece: Piece, counts: Ints) -> Tensor:
        keys = self.keys(piece).view(len(counts), -1)
        pruned = keys == torch.iinfo(keys.dtype).max
        keys = keys.masked_fill(pruned, -1)
        left = (~pruned).sum(1) - torch.from_numpy(counts).to(self.device)
        kept = torch.empty(keys.shape, dtype=torch.bool, device=self.device)
        for count in sorted(set(left.tolist())):
            rows = left == count
            kept[rows] = self.largest(keys[rows].unsqueeze(2), count).squeeze(2)
        return self.pack(kept.view(-1))

    def any_along(self, flags: Tensor) -> Tensor:
        return flags.any(0).any(1)

    def lines(self, bits: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """Takes a mask apart in lines along the second of three dimensions, as of most_ones."""
        outer, size, inner = sizes
        if inner == 1 and size % 8 == 0:
            return bits.view(outer, size // 8)
        flags = self.unpack(bits, outer * size * inner).view(sizes)
        return self.pack(flags.movedim(1, 2).reshape(-1, size))

    def most_ones(self, lines: Tensor) -> list[int]:
        lines = pad(lines, (0, lines.shape[1] % 2))
        twos = lines - ((lines >> 1) & 0x55)  # each two bits now say how many of them were 1
        fours = (twos & 0x33) + ((twos >> 2) & 0x33)
        eights = (fours & 0x0F) + (fours >> 4)
        by_two = eights.contiguous().view(torch.int16)
        sixteens = (by_two & 0xFF) + (by_two >> 8)
        parts = (twos & 0xAA, fours & 0x0F, fours >> 4, eights, sixteens)
        two, low, high, eight, sixteen = torch.stack([part.max().int() for part in parts]).tolist()
        return [2 if two else min(1, eight), max(low, high), eight, sixteen]

    def nonzero_blocks(self, lines: Tensor) -> list[int]:
        lines = pad(lines, (0, lines.shape[1] % 2))
        by_4 = _joined(_joined(lines, 0), 0)
        by_8 = _joined(by_4, 0)
        by_16 = _joined(_joined(by_8, 0), 1)
        by_32 = _joined(_joined(by_16, 0), 1)
        blocks = (by_4 & 0x0F, by_4 >> 4, by_8, by_16, by_32)
        low, high, *larger = torch.stack([part.count_nonzero() for part in blocks]).tolist()
        return [low + high, *larger]

    def layouts(self, bits: Tensor, begins: Ints, shapes: Sequence[Sequence[int]]) -> Layouts:
        most, blocks = np.zeros((2, len(shapes), 4), np.int64)
        ones, slices = list[int](), list[int]()
        for index, (begin, shape) in enumerate(zip(begins.tolist(), shapes, strict=True)):
            elements = math.prod(shape)
            part = bits[begin // 8 : (begin + elements + 7) // 8]
            flags = self.unpack(part, elements)
            sizes = [around(shape, dim) for dim in range(len(shape))]
            ones.append(int(flags.count_nonzero()))
            slices += [int(self.any_along(flags.view(of)).count_nonzero()) for of in sizes]
            most[index] = self.most_ones(self.lines(part, sizes[:2][-1]))
            if len(shape) > 1:
                matrix = shape[0], elements // shape[0], 1
                blocks[index] = self.nonzero_blocks(self.lines(part, matrix))
        return Layouts(np.array(ones), np.array(slices), most, blocks)

    def nonzero(self, values: Tensor) -> Tensor:
        return values != 0

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        zero = values == 0
        if kept is not None:
            zero |= ~self.unpack(kept, len(values))
        return int(zero.count_nonzero())

    def count_magnitudes(
        self, values: Tensor, kept: Tensor | None, largest: float, counts: Ints
    ) -> None:
        size, x = counts.shape[1], values.to(torch.float64).abs()
        is_finite = x.isfinite()
        share = torch.where(is_finite & (x > 0), x / largest, 0.0)
        places = (share * (size - 2)).to(torch.int64).clamp(max=size - 3) + 1
        places = torch.where(x == 0, 0, torch.where(is_finite, places, size - 1))
        if kept is not None:
            places += size * ~self.unpack(kept, len(values))
        counts += torch.bincount(places, minlength=2 * size).view(2, -1).cpu().numpy()

    def count_pixels(
        self, bits: Tensor, begin: int, end: int, stride: int, rows: int, columns: int, counts: Ints
    ) -> None:
        height, width = counts.shape
        index = torch.arange(begin, end, device=self.device)
        row = index // columns
        column = index - row * columns
        index = index[bits_at(bits, row * stride + column)]
        row = index // columns
        column = index - row * columns
        pixels = ((row + 1) * height - 1) // rows * width + ((column + 1) * width - 1) // columns
        counts += torch.bincount(pixels, minlength=counts.size).view(height, -1).cpu().numpy()

    def fold(self, values: Tensor, kept: Tensor) -> None:
        bits, sign = signed_bits(values)
        torch.where(self.unpack(kept, len(bits)), bits, bits & sign, out=bits)

    def power_sums(self, values: Tensor, first: int, last: int, p: float) -> Tensor:
        rows = values[:, first:last].transpose(0, 1).flatten(1).to(torch.float64)
        if p not in EXACT_POWERS:  # others differ from device to device
            rows = rows.cpu()
        return row_sums(rows.abs().pow(p)).to(self.device)

    def largest(self, keys: Tensor, n: int) -> Tensor:
        ascending = keys.argsort(dim=1, stable=True)
        found = torch.zeros(keys.shape, dtype=torch.bool, device=self.device)
        return found.scatter_(1, ascending[:, max(0, keys.shape[1] - n) :], True)


def _joined(blocks: Tensor, dim: int) -> Tensor:
    """Two neighbours each along a dimension as one, with the bits of both."""
    if blocks.shape[dim] % 2:
        blocks = pad(blocks, (0, dim, 0, 1 - dim))
    pairs = blocks.reshape(*blocks.shape[:dim], -1, 2, *blocks.shape[dim + 1 :])
    return pairs.select(dim + 1, 0) | pairs.select(dim + 1, 1)
