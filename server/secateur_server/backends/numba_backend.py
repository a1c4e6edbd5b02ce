"""The backend of CPUs: kernels compiled by numba, on all cores.

torch needs an operation for every step of a loop, and each reads and writes memory.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import (
    kernels,
    kernels_curve,
    kernels_details,
    kernels_many,
    kernels_rows,
    kernels_units,
)
from secateur_server.backends.buffers import BUFFERS, LEAST_BYTES
from secateur_server.backends.cores import CORES, map_on_cores
from secateur_server.backends.keys import BITS, signed_bits
from secateur_server.backends.pieces import EXACT_POWERS, Batch, Cut, Ints, Layouts, Piece, Split
from secateur_server.backends.randomness import RandomScores
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.runtime.context import Found, Item, RequestContext

# Scratch memory that is not malloc's has this size or a larger power of two. A buffer is reused for
# few other sizes; otherwise it is freed, and that takes longer than a pass over a small tensor.
LEAST_SCRATCH = 1 << 22


class NumbaBackend(TorchBackend):
    """The kernels of kernels.py; numpy, where it is faster than torch."""

    @property
    def threads(self) -> int:
        return CORES

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        return map_on_cores(context, function, pieces)

    def allocate(self, size: int) -> Tensor:
        if size == 0:  # of numpy's torch makes a tensor that has no view as another dtype
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(BUFFERS.take(size))

    def pack(self, flags: Tensor) -> Tensor:
        return torch.from_numpy(np.packbits(flags.numpy(), axis=-1, bitorder="little"))

    def unpack(self, bits: Tensor, count: int) -> Tensor:
        flags = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))

    def any_along(self, flags: Tensor) -> Tensor:
        found: Any = flags.numpy().any(0)  # 30 times as fast as torch
        return torch.from_numpy(found.any(1))

    def ascending(self, keys: Tensor) -> Tensor:
        return torch.from_numpy(np.sort(keys.numpy()))  # with vectors: 20 times as fast as torch

    def kth(self, keys: Tensor, place: int) -> int:
        return int(np.partition(keys.numpy(), place - 1)[place - 1])

    def nonzero(self, values: Tensor) -> Tensor:
        bits, sign = signed_bits(values)  # numpy has no bfloat16, and is slow at float16
        is_wide = values.dtype in (torch.float32, torch.float64)
        found: Any = (values.numpy() if is_wide else bits.numpy() & ~sign) != 0
        return torch.from_numpy(found)

    def count_ones(self, bits: Tensor) -> int:
        return int(kernels.count_ones(bits.numpy()))

    def layouts(self, bits: Tensor, begins: Ints, shapes: Sequence[Sequence[int]]) -> Layouts:
        dims = np.array([len(shape) for shape in shapes])
        sizes = np.array(list(itertools.chain.from_iterable(shapes)))
        ones, slices = np.empty(len(shapes), np.int64), np.empty(len(sizes), np.int64)
        most, blocks = np.zeros((2, len(shapes), 4), np.int64)
        kernels_many.layout_each(bits.numpy(), begins, sizes, dims, ones, slices, most, blocks)
        return Layouts(ones, slices, most, blocks)

    def most_ones(self, lines: Tensor) -> list[int]:
        most = np.empty(4, np.uint8)
        kernels_units.most_ones(lines.numpy(), most)
        return list(map(int, most))

    def nonzero_blocks(self, lines: Tensor) -> list[int]:
        counts = np.zeros(4, np.int64)
        kernels_units.nonzero_blocks(lines.numpy(), counts)
        return list(map(int, counts))

    def _random_keys(self, scores: RandomScores, units: int) -> Tensor:
        return _random_bits(scores, units)

    def extremes(self, values: Tensor) -> tuple[int, int]:
        bits = values.view(BITS[values.dtype]).numpy()
        smallest, largest = kernels.extremes(bits, _largest(bits))
        return int(smallest), int(largest)

    def rank(self, keys: Tensor, place: int) -> tuple[Cut, Tensor]:
        key, kept = self.kth(keys, place), torch.empty(len(keys), dtype=torch.bool)
        of_keys = keys.numpy()
        cut, largest = of_keys.dtype.type(key), _largest(of_keys)
        ties, equal = kernels.rank(of_keys, cut, largest, place, kept.numpy())
        return Cut(key, int(ties), int(equal)), kept

    def count_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        bits, into = _bits(piece).numpy(), counts.numpy()
        of_piece = bits, _unpruned(piece), _largest(bits)
        if shift + width == 8 * bits.itemsize - 1:
            kernels.count_top_digits(*of_piece, shift, into[0])
        elif len(prefixes) == 1:
            kernels.count_digits(*of_piece, int(prefixes), shift, width, into[0])
        else:
            lookup = _lookup(prefixes.numpy(), shift + width)
            kernels_curve.count_many_digits(*of_piece, *lookup, shift, width, into)

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        bits = _bits(piece).numpy()
        cut = bits.dtype.type(key)
        below, equal = kernels_curve.count_below(bits, _unpruned(piece), _largest(bits), cut)
        return int(below), int(equal)

    def sum_squares(self, piece: Piece, values: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        if values.dtype not in (torch.float32, torch.float64):  # numba has no half precision
            values = _scratch(len(values), torch.float64).copy_(values)
        bits, size = _bits(piece).numpy(), 2 * len(cuts) + 1
        sums, counts = np.zeros(size), np.zeros(size, int)
        lookup = values.contiguous().numpy(), *_lookup(cuts.numpy(), 0)
        kernels_curve.sum_squares(bits, _unpruned(piece), _largest(bits), *lookup, sums, counts)
        return torch.from_numpy(sums), torch.from_numpy(counts)

    def sample(self, piece: Piece, index: Tensor) -> Tensor:
        # Of random scores no others are made, of other dtypes no others converted.
        if (stored := piece.scores.stored) is None or stored.dtype != piece.dtype:
            return super().sample(piece, index)
        bits = _bits(piece).numpy()
        found = torch.empty(len(index), dtype=BITS[piece.dtype])
        into = index.numpy(), found.numpy()
        return found[: kernels.sample(bits, _unpruned(piece), _largest(bits), *into)]

    def cut_few(
        self, context: RequestContext, pieces: Sequence[Piece], place: int
    ) -> tuple[Cut, Tensor]:
        if len(pieces) == 1:
            bits, unpruned = _bits(pieces[0]).numpy(), _unpruned(pieces[0])
        else:
            bits, unpruned = _side_by_side(context, pieces)
        kept = self.allocate((len(bits) + 7) // 8)
        found = _scratch(len(bits), BITS[pieces[0].dtype]).numpy()
        into = kept.numpy(), found, _scratch(len(bits), torch.int32).numpy()
        cut = kernels.cut_few(bits, unpruned, _largest(bits), place, *into)
        return Cut(*map(int, cut)), kept

    def cut_each(self, batch: Batch, counts: Ints) -> tuple[Tensor, Ints]:
        kept, cuts = torch.empty_like(batch.unpruned), np.empty((len(counts), 3), np.int64)
        bits: Any = batch.bits.numpy()
        spans = batch.begins, batch.units, counts
        unpruned, into = batch.unpruned.numpy(), kept.numpy()
        kernels_many.cut_each(bits, unpruned, _largest(bits), *spans, into, cuts)
        return kept, cuts

    def cut_rows(self, piece: Piece, counts: Ints) -> Tensor:
        if piece.units <= kernels_units.COUNTED * len(counts):
            return super().cut_rows(piece, counts)
        bits, kept = _bits(piece).numpy(), self.allocate((piece.units + 7) // 8)
        kernels_rows.cut_rows(bits, _unpruned(piece), _largest(bits), counts, kept.numpy())
        return kept

    def split(self, pieces: Sequence[Piece], low: int, high: int) -> Split:
        units, dtype = sum(piece.units for piece in pieces), BITS[pieces[0].dtype]
        found, at = _scratch(units, dtype), _scratch(units, torch.int32)
        kept = self.allocate(sum((piece.units + 7) // 8 for piece in pieces))
        held = [_bits(piece) for piece in pieces]
        assert all(bits.dtype == dtype for bits in held), "addresses do not tell of widths"
        addresses = [
            (
                bits.data_ptr(),
                0 if piece.unpruned is None else piece.unpruned.data_ptr(),
                piece.units,
            )
            for bits, piece in zip(held, pieces, strict=True)
        ]
        of_keys: Any = found.numpy()
        of_bits = of_keys.dtype.type  # of another dtype they would be compared as int64
        bounds = _largest(of_keys), of_bits(low), of_bits(high)
        into = kept.numpy(), of_keys, at.numpy()
        above, within = kernels.split_many(np.array(addresses), *bounds, *into)
        return Split(kept, int(above), found[:within].clone(), at[:within].clone())

    def keep(self, kept: Tensor, at: Tensor, flags: Tensor) -> None:
        kernels.keep(kept.numpy(), at.numpy(), flags.numpy())

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        of_values, sign = signed_bits(values)
        bits, flags = of_values.numpy(), None if kept is None else kept.numpy()
        return int(kernels.count_zeros(bits, flags, bits.dtype.type(~sign)))

    def count_magnitudes(
        self, values: Tensor, kept: Tensor | None, largest: float, counts: Ints
    ) -> None:
        if values.dtype not in (torch.float32, torch.float64):  # of integers and half precision
            wide = torch.float32 if values.is_floating_point() else torch.float64
            values = _scratch(len(values), wide).copy_(values)
        flags = _NO_BITS if kept is None else kept.numpy()
        kernels_details.count_magnitudes(values.numpy(), flags, largest, counts)

    def count_pixels(
        self, bits: Tensor, begin: int, end: int, stride: int, rows: int, columns: int, counts: Ints
    ) -> None:
        edges = np.arange(counts.shape[1] + 1) * columns // counts.shape[1]
        kernels_details.count_pixels(bits.numpy(), begin, end, stride, rows, edges, counts)

    def fold(self, values: Tensor, kept: Tensor) -> None:
        bits, sign = signed_bits(values)
        kernels.fold(bits.numpy(), kept.numpy(), sign)

    def power_sums(self, values: Tensor, first: int, last: int, p: float) -> Tensor:
        if p not in EXACT_POWERS:
            return super().power_sums(values, first, last, p)
        if values.dtype not in (torch.float32, torch.float64):  # numba has no half precision
            values, first, last = values[:, first:last].to(torch.float32), 0, last - first
        outer, _, inner = values.shape
        sums = np.empty(last - first)
        of_values = values.contiguous().numpy()
        if outer == 1:
            kernels.sum_rows(of_values[0, first:last], float(p), np.empty(inner), sums)
        else:
            halves = np.empty((outer * inner, last - first))
            kernels.sum_columns(of_values, first, float(p), halves, sums)
        return torch.from_numpy(sums)

    def largest(self, keys: Tensor, n: int) -> Tensor:
        if keys.shape[1] > kernels_units.COUNTED:
            return super().largest(keys, n)
        found = torch.empty(keys.shape, dtype=torch.bool)
        kernels_units.largest(keys.contiguous().numpy(), n, found.numpy())
        return found


_NO_BITS: Any = np.empty(0, np.uint8)


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for intermediate values, until nothing refers to it.

    Not one of each thread: a server has some hundred threads, and each would keep its largest.
    """
    size = 1 << (count * dtype.itemsize - 1).bit_length() if count else 1
    if size >= LEAST_BYTES:
        size = max(size, LEAST_SCRATCH)
    return torch.from_numpy(BUFFERS.take(size))[: count * dtype.itemsize].view(dtype)


def _bits(piece: Piece) -> Tensor:
    """The integers that have the bits of a piece's scores."""
    return piece.scores.bits(piece.dtype, piece.units, _random_bits)


def _random_bits(scores: RandomScores, units: int) -> Tensor:
    bits = _scratch(units, torch.int32)
    kernels.random_bits(scores.state, scores.begin, bits.numpy())
    return bits


def _unpruned(piece: Piece) -> Any:
    return None if piece.unpruned is None else piece.unpruned.numpy()


def _side_by_side(context: RequestContext, pieces: Sequence[Piece]) -> tuple[Any, Any]:
    """The bits of pieces, each from a new byte of the mask on, and which of them are unpruned.

    What lies between them is not: the last byte of a mask is padded with 0.
    """
    sizes = [(piece.units + 7) // 8 for piece in pieces]
    bits = _scratch(8 * sum(sizes), BITS[pieces[0].dtype]).numpy()
    unpruned = np.full(sum(sizes), 0xFF, np.uint8)
    begin = 0
    for piece, size in zip(context.each(pieces), sizes, strict=True):
        bits[8 * begin : 8 * begin + piece.units] = _bits(piece).numpy()
        if piece.unpruned is not None:
            unpruned[begin : begin + size] = piece.unpruned.numpy()
        elif piece.units % 8:
            unpruned[begin + size - 1] = (1 << piece.units % 8) - 1
        begin += size
    return bits, unpruned


def _largest(bits: Any) -> Any:
    return _largest_of(bits.dtype)


@cache  # numpy computes it anew each time
def _largest_of(dtype: Any) -> Any:
    return dtype.type(np.iinfo(dtype).max)


# Bits of a head, by which kernels_curve looks up: the table stays in the second-level cache.
HEAD_BITS = 16


def _lookup(wanted: Any, low: int) -> tuple[Any, Any, int]:
    """What kernels_curve looks keys without their `low` bits up in: wanted, first, head."""
    bits = 8 * wanted.itemsize - 1
    head = max(low, bits - HEAD_BITS)
    heads = (wanted >> (head - low)).astype(np.int64)
    repeats = np.diff(heads + 1, prepend=0, append=1 << (bits - head))
    first = ~np.repeat(np.arange(len(wanted) + 1, dtype=np.int32), repeats)
    first[heads] = ~first[heads]
    beyond = wanted.dtype.type(np.iinfo(wanted.dtype).max)
    return np.append(wanted, beyond), first, head
