"""The passes on a GPU, compiled by Triton where it can compile."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur_server.backends import kernels_triton as kernels
from secateur_server.backends.cuda_backend import CudaBackend
from secateur_server.backends.keys import BITS, signed_bits
from secateur_server.backends.protocol import DIGIT_BITS, Backend, Piece, Split
from secateur_server.backends.randomness import RandomScores
from secateur_server.runtime.context import RequestContext

log = logging.getLogger(__name__)

Look = tuple[Tensor, Tensor, Tensor]


class TritonBackend(CudaBackend):
    """The compiled passes of kernels_cuda.py: torch needs an operation for every step of a pass."""

    # None of these passes keeps a number for each unit; they convert scores of other dtypes.
    ranked = 1 << 25

    def split_all(
        self,
        context: RequestContext,
        pieces: Sequence[Piece],
        low: int,
        high: int,
        kept: Sequence[Tensor],
    ) -> list[Split]:
        """As Backend.split_all."""
        context.check()
        return self._split_together(pieces, low, high, kept)

    def _split_together(
        self, pieces: Sequence[Piece], low: int, high: int, kept: Sequence[Tensor]
    ) -> list[Split]:
        """As Backend.split_all: the GPU is not waited for between the pieces."""
        sizes = [len(bits) for bits in kept]
        within, counts = self.allocate(sum(sizes)), self._zeros(len(pieces), 2)
        into = zip(pieces, kept, torch.split(within, sizes), counts, strict=True)
        for piece, above_bits, within_bits, count in into:
            self._look(piece, low, high, (above_bits, within_bits, count))
        above, inside = counts.t().tolist()
        begins = itertools.accumulate(sizes, initial=0)
        found = []
        parts = zip(pieces, above, torch.split(self._ones_at(within), inside), begins, strict=False)
        for piece, count, places, begin in parts:
            at = places - 8 * begin
            found.append(Split(count, self.keys_at(piece, at), at.to(torch.int32)))
        return found

    def split(self, piece: Piece, low: int, high: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As Backend.split."""
        (found,) = self._split_together([piece], low, high, [kept])
        return found.keys, found.at

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        """As Backend.count_below."""
        above, equal = self._counts(piece, key, key + 1)
        unpruned = piece.units if piece.unpruned is None else self.count_ones(piece.unpruned)
        return unpruned - above - equal, equal

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        """As Backend.count_zeros."""
        bits, sign = signed_bits(values)
        if sign == 0:  # integers: those below 0 have no key
            return super().count_zeros(values, kept)
        return len(bits) - self._counts(Piece(len(bits), values, values.dtype, kept), 1, 1)[0]

    def pack(self, mask: Tensor) -> Tensor:
        """As Backend.pack."""
        bits = self.allocate((len(mask) + 7) // 8)
        as_scores = mask.contiguous().view(torch.float8_e5m2)  # whose bits are bytes
        piece = Piece(len(mask), as_scores, torch.float8_e5m2, None)
        self._look(piece, 1, 1, (bits, torch.empty_like(bits), self._zeros(2)))
        return bits

    def count_ones(self, bits: Tensor) -> int:
        """As Backend.count_ones."""
        count = self._zeros(1)
        self._launch(kernels.count_ones, bits.contiguous(), count, len(bits))
        return int(count)

    def extremes(self, values: Tensor) -> tuple[int, int]:
        """As Backend.extremes."""
        bits = values.contiguous().view(BITS[values.dtype])
        largest = torch.iinfo(bits.dtype).max
        found = torch.tensor([largest, 0], device=self.device)
        self._launch(kernels.extremes, bits, found, len(bits), largest)
        smallest, largest = found.tolist()
        return smallest, largest

    def add_digits(self, piece: Piece, prefix: int, shift: int, counts: Tensor) -> None:
        """As Backend.add_digits."""
        bits, unpruned, largest, *of_random = _of(piece, counts)
        numbers = piece.units, largest, prefix, shift
        self._launch(kernels.add_digits, bits, unpruned, counts, *numbers, *of_random)

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    def _counts(self, piece: Piece, low: int, high: int) -> tuple[int, int]:
        """How many units are alive and at `high` or above, and how many in [low, high)."""
        size, counts = (piece.units + 7) // 8, self._zeros(2)
        self._look(piece, low, high, (self.allocate(size), self.allocate(size), counts))
        above, within = counts.tolist()
        return above, within

    def _look(self, piece: Piece, low: int, high: int, into: Look) -> None:
        """As kernels.split.  into: kept, within and counts."""
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
    """What the kernels take of a piece; `unused` stands where they look at nothing."""
    unpruned, are_all = (unused, True) if piece.unpruned is None else (piece.unpruned, False)
    largest = torch.iinfo(BITS[piece.dtype]).max
    if isinstance(piece.scores, RandomScores):
        return unused, unpruned, largest, piece.scores.state, piece.scores.begin, True, are_all
    bits = piece.scores.to(piece.dtype).contiguous().view(BITS[piece.dtype])
    return bits, unpruned, largest, 0, 0, False, are_all


def triton_or_torch(device: torch.device) -> type[CudaBackend]:
    """The passes that a GPU can do: those of torch's operations, where the compiled ones fail.

    Triton needs a C compiler and a folder to write to, of which a container may have neither.
    """
    try:
        _try_out(device)
    except Exception as error:  # of the compiler, the system and Triton, which have many
        log.warning("%s: kernels are not compiled, which would be faster: %s", device, error)
        return CudaBackend
    return TritonBackend


def _try_out(device: torch.device) -> None:
    """Compiles what calls need.

    Errors: whatever Triton meets; and ValueError, where it finds other numbers than torch.
    """
    values = torch.linspace(-1, 1, 2 * kernels.UNITS.value + 5, device=device)
    flags, units = values > -0.9, len(values)
    pieces = [
        Piece(
            units, scores, scores.dtype if isinstance(scores, Tensor) else torch.float32, unpruned
        )
        for scores in (values, values.double(), values.half(), RandomScores(0))
        for unpruned in (None, Backend(device).pack(flags))
    ]
    for piece in pieces:
        ours, torchs = (
            _some_of(backend(device), piece, flags) for backend in (TritonBackend, CudaBackend)
        )
        if ours != torchs:
            raise ValueError(f"of {piece.dtype} Triton finds other units than torch")


def _some_of(backend: Backend, piece: Piece, flags: Tensor) -> list[object]:
    keys = backend.keys(piece)
    low, high = (int(key) for key in keys.sort().values[[len(keys) // 4, len(keys) // 2]])
    kept = backend.allocate((piece.units + 7) // 8)
    found, at = backend.split(piece, low, high, kept)
    counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=backend.device)
    backend.add_digits(piece, 0, torch.iinfo(keys.dtype).bits - DIGIT_BITS, counts)
    results = kept, found, at, counts, backend.pack(flags)
    extremes = None if isinstance(piece.scores, RandomScores) else backend.extremes(piece.scores)
    numbers = backend.count_ones(kept), backend.count_below(piece, high), extremes
    return [*(result.tolist() for result in results), *numbers]
