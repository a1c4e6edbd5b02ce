"""The passes on a CPU: on all cores, and compiled where numba is there.

torch's own threads meet at the end of every operation, and so wait long where other work takes a
core from one of them; threads that each take whole pieces do not. Nothing that a piece yields may
depend on the others, so no number of threads shows in a result.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import kernels, kernels_curve, kernels_units
from secateur_server.backends.buffers import Buffers
from secateur_server.backends.cgroups import cores
from secateur_server.backends.keys import BITS, signed_bits
from secateur_server.backends.protocol import (
    DIGIT_BITS,
    EXACT_POWERS,
    Backend,
    Cut,
    Layout,
    Piece,
    Split,
)
from secateur_server.backends.randomness import RandomScores
from secateur_server.backends.threads import start_all
from secateur_server.runtime.context import Found, Item, RequestContext

CORES = cores(len(os.sched_getaffinity(0)))

_thread = threading.local()


def one_thread() -> None:
    """Keeps torch to the calling thread."""
    torch.set_num_threads(1)


def _start_in_pool() -> None:
    one_thread()
    _thread.in_pool = True


# Of a split: a piece, and the bits of what is kept of it.
Part = tuple[Piece, Tensor]

_BUFFERS = Buffers()

_POOL = ThreadPoolExecutor(CORES, thread_name_prefix="pieces", initializer=_start_in_pool)


def start_threads() -> None:
    """Starts all threads that calls need. Raises RuntimeError if the system refuses one."""
    start_all(_POOL, CORES)
    _BUFFERS.start()


class CpuBackend(Backend):
    """Operations of torch and numpy on pieces whose temporaries stay in the caches."""

    look_bytes = 1  # what has just landed is in a cache
    threads = CORES

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """As Backend.map, on all cores."""
        pieces = list(pieces)
        # One piece waits for no other thread; a thread of the pool must not wait for the pool.
        if len(pieces) == 1 or getattr(_thread, "in_pool", False):
            return super().map(context, function, pieces)
        # Many small ones are sooner done than handed over one by one.
        size = max(1, len(pieces) // (8 * CORES))
        shares = [pieces[begin : begin + size] for begin in range(0, len(pieces), size)]

        found = _POOL.map(lambda share: context.map(function, share), shares)
        return list(itertools.chain.from_iterable(found))

    def allocate(self, size: int) -> Tensor:
        """As Backend.room."""
        if size == 0:  # of numpy's torch makes a tensor that has no view as another dtype
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(_BUFFERS.take(size))

    def receive(self, data: memoryview, target: Tensor) -> None:
        """As Backend.land."""
        np.copyto(target.numpy(), np.frombuffer(data, np.uint8))

    def landed(self, data: memoryview) -> Tensor:
        """As Backend.landed."""
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def pack(self, mask: Tensor) -> Tensor:
        """As Backend.pack."""
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))

    def unpack(self, bits: Tensor, count: int) -> Tensor:
        """As Backend.unpack."""
        flags = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))

    def pack_lines(self, flags: Tensor) -> Tensor:
        """As Backend.pack_lines."""
        return torch.from_numpy(np.packbits(flags.numpy(), axis=1, bitorder="little"))

    def any_along(self, flags: Tensor) -> Tensor:
        """As Backend.any_along."""
        found: Any = flags.numpy().any(0)  # 30 times as fast as torch
        return torch.from_numpy(found.any(1))

    def count_along(self, flags: Tensor) -> int:
        """As Backend.count_along."""
        return int(np.count_nonzero(flags.numpy().any((0, 2))))

    def ascending(self, keys: Tensor) -> Tensor:
        """As Backend.ascending."""
        return torch.from_numpy(np.sort(keys.numpy()))  # with vectors: 20 times as fast as torch

    def nonzero(self, values: Tensor) -> Tensor:
        """As Backend.nonzero."""
        bits, sign = signed_bits(values)  # numpy has no bfloat16, and is slow at float16
        is_wide = values.dtype in (torch.float32, torch.float64)
        found: Any = (values.numpy() if is_wide else bits.numpy() & ~sign) != 0
        return torch.from_numpy(found)

    def kth(self, keys: Tensor, place: int) -> int:
        """As Backend.kth."""
        return int(np.partition(keys.numpy(), place - 1)[place - 1])


class NumbaBackend(CpuBackend):
    """The compiled passes of kernels.py: torch needs an operation for every step of a pass."""

    def count_ones(self, bits: Tensor) -> int:
        """As Backend.count_ones."""
        return int(kernels.count_ones(bits.numpy()))

    def layout(self, bits: Tensor, shape: Sequence[int]) -> Layout:
        """As Backend.layout."""
        slices, most = np.empty(len(shape), np.int64), np.empty(4, np.uint8)
        blocks = np.zeros(4 if len(shape) > 1 else 0, np.int64)
        kernels_units.layout(bits.numpy(), np.array(shape), slices, most, blocks)
        return Layout(slices.tolist(), most.tolist(), blocks.tolist())

    def most_ones(self, lines: Tensor) -> list[int]:
        """As Backend.most_ones."""
        most = np.empty(4, np.uint8)
        kernels_units.most_ones(lines.numpy(), most)
        return list(map(int, most))

    def nonzero_blocks(self, lines: Tensor) -> list[int]:
        """As Backend.nonzero_blocks."""
        counts = np.zeros(4, np.int64)
        kernels_units.nonzero_blocks(lines.numpy(), counts)
        return list(map(int, counts))

    def extremes(self, values: Tensor) -> tuple[int, int]:
        """As Backend.extremes."""
        bits = values.view(BITS[values.dtype]).numpy()
        smallest, largest = kernels.extremes(bits, _largest(bits))
        return int(smallest), int(largest)

    def add_digits(self, piece: Piece, prefix: int, shift: int, counts: Tensor) -> None:
        """As Backend.add_digits."""
        bits = _bits(piece).numpy()
        if shift + DIGIT_BITS == 8 * bits.itemsize:
            kernels.count_top_digits(bits, _unpruned(piece), _largest(bits), shift, counts.numpy())
        else:
            kernels.count_digits(
                bits, _unpruned(piece), _largest(bits), prefix, shift, counts.numpy()
            )

    def rank(self, keys: Tensor, place: int) -> tuple[Cut, Tensor]:
        """As Backend.rank."""
        key, stays = self.kth(keys, place), torch.empty(len(keys), dtype=torch.bool)
        of_keys = keys.numpy()
        cut, largest = of_keys.dtype.type(key), _largest(of_keys)
        ties, equal = kernels.rank(of_keys, cut, largest, place, stays.numpy())
        return Cut(key, int(ties), int(equal)), stays

    def count_many_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        """As Backend.count_many_digits."""
        bits, into = _bits(piece).numpy(), counts.numpy()
        of = bits, _unpruned(piece), _largest(bits)
        if shift + width == 8 * bits.itemsize - 1:
            kernels.count_top_digits(*of, shift, into[0])
        else:
            look = _looked_up(prefixes.numpy(), shift + width)
            kernels_curve.count_many_digits(*of, *look, shift, width, into)

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        """As Backend.count_below."""
        bits = _bits(piece).numpy()
        cut = bits.dtype.type(key)
        below, equal = kernels_curve.count_below(bits, _unpruned(piece), _largest(bits), cut)
        return int(below), int(equal)

    def sum_squares(self, piece: Piece, values: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """As Backend.sum_squares."""
        if values.dtype not in (torch.float32, torch.float64):  # numba has no half precision
            values = _scratch(len(values), torch.float64).copy_(values)
        bits, size = _bits(piece).numpy(), 2 * len(cuts) + 1
        sums, counts = np.zeros(size), np.zeros(size, int)
        look = values.contiguous().numpy(), *_looked_up(cuts.numpy(), 0)
        kernels_curve.sum_squares(bits, _unpruned(piece), _largest(bits), *look, sums, counts)
        return torch.from_numpy(sums), torch.from_numpy(counts)

    def sample(self, piece: Piece, index: Tensor) -> Tensor:
        """As Backend.sample."""
        # Of random scores no others are made, of other dtypes no others converted.
        if isinstance(piece.scores, RandomScores) or piece.scores.dtype != piece.dtype:
            return super().sample(piece, index)
        bits = _bits(piece).numpy()
        found = torch.empty(len(index), dtype=BITS[piece.dtype])
        into = index.numpy(), found.numpy()
        return found[: kernels.sample(bits, _unpruned(piece), _largest(bits), *into)]

    def cut_few(
        self,
        context: RequestContext,
        pieces: Sequence[Piece],
        place: int,
        kept: Sequence[Tensor],
    ) -> Cut:
        """As Backend.cut_few."""
        if len(pieces) == 1:
            of_piece = _bits(pieces[0]).numpy(), _unpruned(pieces[0])
            return _cut_few(*of_piece, pieces[0].dtype, place, kept[0].numpy())
        bits, unpruned = _side_by_side(context, pieces)
        stays = np.empty_like(unpruned)
        cut = _cut_few(bits, unpruned, pieces[0].dtype, place, stays)
        begin = 0
        for part in context.each(kept):
            part.numpy()[:] = stays[begin : begin + len(part)]
            begin += len(part)
        return cut

    def split(self, piece: Piece, low: int, high: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As Backend.split."""
        (found,) = self._split_together([(piece, kept)], low, high)
        return found.keys, found.at

    def split_all(
        self,
        context: RequestContext,
        pieces: Sequence[Piece],
        low: int,
        high: int,
        kept: Sequence[Tensor],
    ) -> list[Split]:
        """As Backend.split_all: small pieces go together."""
        batches: list[list[Part]] = []
        room = 0
        for piece, bits in zip(context.each(pieces), kept, strict=True):
            if piece.units > room:
                batches.append([])
                room = max(piece.units, self.piece)
            batches[-1].append((piece, bits))
            # Random scores are made in a place that the next ones take.
            room = 0 if isinstance(piece.scores, RandomScores) else room - piece.units
        found = self.map(context, lambda batch: self._split_together(batch, low, high), batches)
        return list(itertools.chain.from_iterable(found))

    def _split_together(self, batch: Sequence[Part], low: int, high: int) -> list[Split]:
        units, dtype = sum(piece.units for piece, _ in batch), BITS[batch[0][0].dtype]
        found, at = _scratch(units, dtype), _scratch(units, torch.int32)
        held = [_bits(piece) for piece, _ in batch]
        assert all(bits.dtype == dtype for bits in held), "addresses do not tell of widths"
        addresses = [
            (
                bits.data_ptr(),
                0 if piece.unpruned is None else piece.unpruned.data_ptr(),
                kept.data_ptr(),
                piece.units,
            )
            for bits, (piece, kept) in zip(held, batch, strict=True)
        ]
        counts = np.empty((len(batch), 2), np.int64)
        of_keys: Any = found.numpy()
        of_bits = of_keys.dtype.type  # of another dtype they would be compared as int64
        bounds = _largest(of_keys), of_bits(low), of_bits(high)
        count = kernels.split_many(np.array(addresses), *bounds, of_keys, at.numpy(), counts)
        above, within = counts.T.tolist()
        keys, places = (torch.split(part[:count].clone(), within) for part in (found, at))
        return list(map(Split, above, keys, places))

    def keep(self, kept: Tensor, at: Tensor, stays: Tensor) -> None:
        """As Backend.keep."""
        kernels.keep(kept.numpy(), at.numpy(), stays.numpy())

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        """As Backend.count_zeros."""
        of_values, sign = signed_bits(values)
        bits, flags = of_values.numpy(), None if kept is None else kept.numpy()
        return int(kernels.count_zeros(bits, flags, bits.dtype.type(~sign)))

    def fold(self, values: Tensor, kept: Tensor) -> None:
        """As Backend.fold."""
        bits, sign = signed_bits(values)
        kernels.fold(bits.numpy(), kept.numpy(), sign)

    def power_sums(self, values: Tensor, first: int, last: int, p: float) -> Tensor | None:
        """As Backend.power_sums."""
        if p not in EXACT_POWERS:
            return None
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
        """As Backend.largest."""
        if keys.shape[1] > kernels_units.COUNTED:
            return super().largest(keys, n)
        found = torch.empty(keys.shape, dtype=torch.bool)
        kernels_units.largest(keys.contiguous().numpy(), n, found.numpy())
        return found


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for intermediate values, until nothing refers to it.

    Not one of each thread: a server has some hundred threads, and each would keep its largest.
    """
    size = 1 << (count * dtype.itemsize - 1).bit_length() if count else 1  # few sizes, used again
    return torch.from_numpy(_BUFFERS.take(size))[: count * dtype.itemsize].view(dtype)


def _bits(piece: Piece) -> Tensor:
    """The integers that have the bits of a piece's scores."""
    if isinstance(piece.scores, RandomScores):
        bits = _scratch(piece.units, torch.int32)
        kernels.random_bits(piece.scores.state, piece.scores.begin, bits.numpy())
        return bits
    return piece.scores.to(piece.dtype).contiguous().view(BITS[piece.dtype])


def _unpruned(piece: Piece) -> Any:
    return None if piece.unpruned is None else piece.unpruned.numpy()


def _cut_few(bits: Any, unpruned: Any, dtype: torch.dtype, place: int, kept: Any) -> Cut:
    found = _scratch(len(bits), BITS[dtype]).numpy()
    at = _scratch(len(bits), torch.int32).numpy()
    return Cut(*map(int, kernels.cut_few(bits, unpruned, _largest(bits), place, kept, found, at)))


def _side_by_side(context: RequestContext, pieces: Sequence[Piece]) -> tuple[Any, Any]:
    """The bits of pieces, each from a new byte of the mask on, and which of them are alive.

    What lies between them is not: of a mask the last byte is padded with 0.
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


@cache  # numpy looks for it anew each time
def _largest_of(dtype: Any) -> Any:
    return dtype.type(np.iinfo(dtype).max)


# Bits of a head, by which kernels_curve looks up: the table stays in the second-level cache.
HEAD_BITS = 16


def _looked_up(wanted: Any, low: int) -> tuple[Any, Any, int]:
    """What kernels_curve looks keys without their `low` bits up in: wanted, first, head."""
    bits = 8 * wanted.itemsize - 1
    head = max(low, bits - HEAD_BITS)
    heads = (wanted >> (head - low)).astype(np.int64)
    repeats = np.diff(heads + 1, prepend=0, append=1 << (bits - head))
    first = ~np.repeat(np.arange(len(wanted) + 1, dtype=np.int32), repeats)
    first[heads] = ~first[heads]
    beyond = wanted.dtype.type(np.iinfo(wanted.dtype).max)
    return np.append(wanted, beyond), first, head
