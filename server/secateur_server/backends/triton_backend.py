"""The backend of GPUs where Triton can compile.

torch has an operation for every step of a loop, and each reads and writes the GPU's memory.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur_server.backends import kernels_triton as kernels
from secateur_server.backends.keys import BITS, signed_bits
from secateur_server.backends.pieces import DIGIT_BITS, Piece, Scores, Split, Stored
from secateur_server.backends.protocol import Backend
from secateur_server.backends.randomness import RandomScores
from secateur_server.backends.torch_backend import TorchBackend

log = logging.getLogger(__name__)

# The bits of what is kept and within bounds, and how many of each.
Written = tuple[Tensor, Tensor, Tensor]


class TritonBackend(TorchBackend):
    """The kernels of kernels_triton.py."""

    @property
    def piece(self) -> int:
        return 1 << 24

    @property
    def ranked(self) -> int:
        return 1 << 25  # the kernels store no number for each unit

    @property
    def batch(self) -> int:
        return 1 << 40  # all pieces: the GPU is waited for once

    def split(self, pieces: Sequence[Piece], low: int, high: int) -> Split:
        sizes = [(piece.units + 7) // 8 for piece in pieces]
        kept, within = self.allocate(sum(sizes)), self.allocate(sum(sizes))
        counts = self._zeros(len(pieces), 2)
        parts = zip(*(torch.split(bits, sizes) for bits in (kept, within)), counts, strict=True)
        for piece, into in zip(pieces, parts, strict=True):  # the GPU is not waited for in between
            self._split(piece, low, high, into)
        above, inside = counts.t().tolist()
        at = self._ones_at(within)
        begins = itertools.accumulate(sizes, initial=0)
        keys = [
            piece.scores.keys_at(piece.dtype, places - 8 * begin)
            for piece, places, begin in zip(pieces, torch.split(at, inside), begins, strict=False)
        ]
        return Split(kept, sum(above), torch.cat(keys), at)

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        above, equal = self._counts(piece, key, key + 1)
        unpruned = piece.units if piece.unpruned is None else self.count_ones(piece.unpruned)
        return unpruned - above - equal, equal

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        bits, sign = signed_bits(values)
        if sign == 0:  # integers: those below 0 have no key
            return super().count_zeros(values, kept)
        piece = Piece(len(bits), Stored(values), values.dtype, kept)
        return len(bits) - self._counts(piece, 1, 1)[0]

    def pack(self, flags: Tensor) -> Tensor:
        lines = pad(flags, (0, -flags.shape[-1] % 8)) if flags.dim() > 1 else flags
        as_scores = lines.reshape(-1).view(torch.float8_e5m2)  # whose bits are bytes
        bits = self.allocate((len(as_scores) + 7) // 8)
        piece = Piece(len(as_scores), Stored(as_scores), torch.float8_e5m2, None)
        self._split(piece, 1, 1, (bits, torch.empty_like(bits), self._zeros(2)))
        return bits.view(*flags.shape[:-1], (flags.shape[-1] + 7) // 8)

    def count_ones(self, bits: Tensor) -> int:
        count = self._zeros(1)
        self._launch(kernels.count_ones, bits.contiguous(), count, len(bits))
        return int(count)

    def extremes(self, values: Tensor) -> tuple[int, int]:
        bits = values.contiguous().view(BITS[values.dtype])
        largest = torch.iinfo(bits.dtype).max
        found = torch.tensor([largest, 0], device=self.device)
        self._launch(kernels.extremes, bits, found, len(bits), largest)
        smallest, largest = found.tolist()
        return smallest, largest

    def count_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        if len(prefixes) > 1:
            return super().count_digits(piece, prefixes, shift, width, counts)
        bits, unpruned, largest, *of_random = _of(piece, counts)
        numbers = piece.units, largest, int(prefixes), shift, width
        self._launch(kernels.count_digits, bits, unpruned, counts, *numbers, *of_random)
        return None

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    def _counts(self, piece: Piece, low: int, high: int) -> tuple[int, int]:
        """How many units are unpruned and at `high` or above, and how many in [low, high)."""
        size, counts = (piece.units + 7) // 8, self._zeros(2)
        self._split(piece, low, high, (self.allocate(size), self.allocate(size), counts))
        above, within = counts.tolist()
        return above, within

    def _split(self, piece: Piece, low: int, high: int, into: Written) -> None:
        """As kernels.split."""
        bits, unpruned, largest, *of_random = _of(piece, into[0])
        numbers = piece.units, largest, low, high
        self._launch(kernels.split, bits, unpruned, *into, *numbers, *of_random)

    def _launch(self, kernel: Any, *args: Any) -> None:
        """Runs a kernel, for as many programs as its units need: its first number."""
        units = next(arg for arg in args if isinstance(arg, int))
        if programs := -(-units // kernels.UNITS.value):
            with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
                kernel[(programs,)](*args)

    def _ones_at(self, bits: Tensor) -> Tensor:
        """Where the ones of bits are, ascending, int64: few of many."""
        bytes_at = bits.nonzero().view(-1)
        places = self.unpack(bits[bytes_at], 8 * len(bytes_at)).nonzero().view(-1)
        return (bytes_at[places >> 3] << 3) + (places & 7)


def _of(piece: Piece, unused: Tensor) -> tuple[Tensor, Tensor, int, int, int, bool, bool]:
    """What the kernels take of a piece; `unused` is passed for tensors that they do not read."""
    unpruned, are_all = (unused, True) if piece.unpruned is None else (piece.unpruned, False)
    largest = torch.iinfo(BITS[piece.dtype]).max
    bits = piece.scores.bits(piece.dtype, piece.units, lambda scores, units: unused)
    is_random = piece.scores.stored is None
    return bits, unpruned, largest, *piece.scores.stream, is_random, are_all


def triton_or_torch(device: torch.device) -> type[TorchBackend]:
    """The backend of a GPU: TritonBackend, or TorchBackend where its kernels fail.

    Triton needs a C compiler and a folder to write to. A container may have neither.
    """
    try:
        _try_out(device)
    except Exception as error:  # of the compiler, the system and Triton, which have many
        log.warning("%s: kernels are not compiled, which would be faster: %s", device, error)
        return TorchBackend
    return TritonBackend


def _try_out(device: torch.device) -> None:
    """Compiles what calls need.

    Raises:
        Exception: Whatever Triton meets; ValueError if its results differ from torch's.
    """
    values = torch.linspace(-1, 1, 2 * kernels.UNITS.value + 5, device=device)
    flags, reference = values > -0.9, TorchBackend(device)
    dtypes = torch.float32, torch.float64, torch.float16
    scored: list[Scores] = [RandomScores(0), *(Stored(values.to(dtype)) for dtype in dtypes)]
    for scores in scored:
        for unpruned in (None, reference.pack(flags)):
            piece = Piece(len(values), scores, scores.dtype, unpruned)
            if _results(TritonBackend(device), piece, flags) != _results(reference, piece, flags):
                raise ValueError(f"{scores.dtype}: the results of Triton and torch differ")


def _results(backend: Backend, piece: Piece, flags: Tensor) -> list[object]:
    keys = backend.keys(piece)
    low, high = (int(key) for key in keys.sort().values[[len(keys) // 4, len(keys) // 2]])
    found = backend.split([piece], low, high)
    width = DIGIT_BITS - 1  # the sign has no digit
    counts = torch.zeros(1, 1 << width, dtype=torch.int64, device=backend.device)
    highest, shift = torch.zeros(1, dtype=keys.dtype), torch.iinfo(keys.dtype).bits - DIGIT_BITS
    backend.count_digits(piece, highest, shift, width, counts)
    results = found.kept, found.keys, found.at, counts, backend.pack(flags)
    stored = piece.scores.stored
    extremes = None if stored is None else backend.extremes(stored)
    numbers = (
        found.above,
        backend.count_ones(found.kept),
        backend.count_below(piece, high),
        extremes,
    )
    return [*(result.tolist() for result in results), *numbers]
