"""What the algorithms need of a device, as operations on arrays.

Every backend gives the same bits. Units are ordered by their keys: see keys.py. Masks are bits: see
pieces.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from secateur_server.backends.pieces import Batch, Cut, Ints, Layouts, Piece, Split
from secateur_server.runtime.context import Found, Item, RequestContext


class Backend(Protocol):
    """The operations on one device. Each reads its tensors once; all lie on the device."""

    device: torch.device

    @property
    def piece(self) -> int:
        """Elements that an operation is best given at once; a multiple of 8."""

    @property
    def ranked(self) -> int:
        """As `piece`, of operations on a Piece that store no number for each unit."""

    @property
    def batch(self) -> int:
        """Units of the pieces that `split` is best given at once."""

    @property
    def scanned(self) -> int:
        """Bytes that have arrived which `extremes` is best given at once."""

    @property
    def threads(self) -> int:
        """How many pieces `map` works on at once."""

    def map(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
    ) -> list[Found]:
        """Applies a function to each piece.

        Returns:
            The results, in order.

        Raises:
            Cancelled, DeadlineExceeded: The request is to end.
        """

    def allocate(self, size: int) -> Tensor:
        """Allocates `size` bytes.

        Returns:
            uint8, (size,), with any values.
        """

    def receive(self, data: memoryview, target: Tensor) -> None:
        """Copies bytes of the host to the device.

        Args:
            data: Bytes; they may change after the call.
            target: uint8, as long; written to.
        """

    def pack(self, flags: Tensor) -> Tensor:
        """Packs flags to bits.

        Args:
            flags: Bool, (n,) or (lines, n).

        Returns:
            uint8, (ceil(n / 8),) or (lines, ceil(n / 8)).
        """

    def unpack(self, bits: Tensor, count: int) -> Tensor:
        """Unpacks the first `count` bits.

        Args:
            bits: uint8, 1-D.
            count: At most 8 len(bits).

        Returns:
            Bool, (count,).
        """

    def count_ones(self, bits: Tensor) -> int:
        """Counts the bits of uint8 that are 1."""

    def extremes(self, values: Tensor) -> tuple[int, int]:
        """Finds the smallest and the largest key.

        Args:
            values: Floating, (n,), n > 0.
        """

    def keys(self, piece: Piece) -> Tensor:
        """Computes the keys of a piece.

        Returns:
            An integer dtype, (units,); the largest integer, which is no score's key, for pruned
            units.
        """

    def count_digits(
        self, piece: Piece, prefixes: Tensor, shift: int, width: int, counts: Tensor
    ) -> None:
        """Adds to histograms of the digits at `shift` of the unpruned keys with given prefixes.

        Args:
            piece: The units.
            prefixes: Of the keys' dtype, ascending, distinct, on the CPU: what is above the digit.
                One 0 where the digit is the highest.
            shift: The lowest bit of the digit.
            width: Bits of the digit, at most DIGIT_BITS.
            counts: int64, (prefixes, 2^width); added to.
        """

    def count_below(self, piece: Piece, key: int) -> tuple[int, int]:
        """Counts the unpruned keys below `key`, and those that are `key`."""

    def sum_squares(self, piece: Piece, values: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums squares of values, in their order, by where the keys lie between cuts.

        Args:
            piece: The units.
            values: (units,), of any dtype.
            cuts: Of the keys' dtype, ascending, distinct.

        Returns:
            The sums, float64, (2 cuts + 1,), on the CPU: at 2j of the unpruned units between cut
            j - 1 and cut j, at 2j + 1 of those at cut j. And how many they are, int64.
        """

    def sample(self, piece: Piece, index: Tensor) -> Tensor:
        """Gathers the keys of the unpruned units at indices.

        Args:
            piece: The units.
            index: int64, ascending, below `ranked`; those beyond the piece are skipped.

        Returns:
            The keys, 1-D, in the order of the indices.
        """

    def ascending(self, keys: Tensor) -> Tensor:
        """Sorts keys."""

    def kth(self, keys: Tensor, place: int) -> int:
        """Finds the `place`-th smallest key, from 1."""

    def rank(self, keys: Tensor, place: int) -> tuple[Cut, Tensor]:
        """Prunes the `place` smallest keys. Ties go to the lowest index.

        Args:
            keys: As `keys` gives them, (n,).
            place: In [1, the number of unpruned keys].

        Returns:
            The cut; and which keys are kept, bool, (n,), False for those that were pruned already.
        """

    def split(self, pieces: Sequence[Piece], low: int, high: int) -> Split:
        """Keeps the unpruned units at `high` or above, and collects those in [low, high).

        Args:
            pieces: One or more, of one dtype, to be worked on at once.
            low: A key.
            high: A key.
        """

    def keep(self, kept: Tensor, at: Tensor, flags: Tensor) -> None:
        """Sets bits.

        Args:
            kept: The bits of a mask, 0 at those places; written to.
            at: Places, int32 or int64.
            flags: Bool, as long: which of those bits to set.
        """

    def cut_few(
        self, context: RequestContext, pieces: Sequence[Piece], place: int
    ) -> tuple[Cut, Tensor]:
        """Prunes the `place` lowest units of few ones. Ties go to the lowest index.

        Args:
            context: The request.
            pieces: All of one dtype; their order is that of the indices.
            place: In [1, the number of unpruned units].

        Returns:
            The cut; and the bits of the kept units, where each piece begins with a new byte.

        Raises:
            Cancelled, DeadlineExceeded: As `map`.
        """

    def cut_each(self, batch: Batch, counts: Ints) -> tuple[Tensor, Ints]:
        """Prunes the lowest units of each tensor. Ties go to the lowest index.

        Args:
            batch: On the CPU.
            counts: How many units of each tensor to prune; at most the unpruned ones.

        Returns:
            The bits of the kept units; and the cuts, (tensors, 3): key, ties and equal, or -1, 0, 0
            where the count is 0.
        """

    def cut_rows(self, piece: Piece, counts: Ints) -> Tensor:
        """Prunes the lowest units of each row. Ties go to the lowest index.

        Args:
            piece: The units of rows, all as long.
            counts: How many units of each row to prune; at most the unpruned ones.

        Returns:
            The bits of the kept units.
        """

    def any_along(self, flags: Tensor) -> Tensor:
        """Finds which indices of the second dimension have a flag.

        Args:
            flags: Bool, (a, n, b).

        Returns:
            Bool, (n,).
        """

    def most_ones(self, lines: Tensor) -> list[int]:
        """Finds how many bits are 1 at most, of 2, 4, 8 and 16 side by side.

        Args:
            lines: uint8, (lines, bytes): each line in bytes of its own, padded with 0.
        """

    def nonzero_blocks(self, lines: Tensor) -> list[int]:
        """Counts the blocks of 4 x 4, 8 x 8, 16 x 16 and 32 x 32 bits that have a 1.

        Args:
            lines: As of most_ones. At the edges blocks are smaller.
        """

    def layouts(self, bits: Tensor, begins: Ints, shapes: Sequence[Sequence[int]]) -> Layouts:
        """Finds where the ones of small masks lie.

        Args:
            bits: Of all masks.
            begins: The element at which each mask begins, a multiple of 8.
            shapes: Of each mask, of one dimension or more, with elements.
        """

    def nonzero(self, values: Tensor) -> Tensor:
        """Finds which values, (n,), are not 0.  Returns: bool, (n,)."""

    def count_zeros(self, values: Tensor, kept: Tensor | None) -> int:
        """Counts the values, (n,), that are 0 or not kept.

        Args:
            values: Of any dtype that can be pruned.
            kept: The bits of a mask; None: all are kept.
        """

    def count_magnitudes(
        self, values: Tensor, kept: Tensor | None, largest: float, counts: Ints
    ) -> None:
        """Adds values, (n,), to histograms of their magnitudes |x|: see histogram.py.

        Args:
            values: Of any dtype that can be pruned.
            kept: The bits of a mask; None: all are kept.
            largest: The largest finite magnitude, or a larger one.
            counts: (2, bins + 2); added to. A line for those kept, and one for those pruned: at 0
                the zeros, then bins of equal width up to `largest`, at last those not finite.
        """

    def count_pixels(
        self, bits: Tensor, begin: int, end: int, stride: int, rows: int, columns: int, counts: Ints
    ) -> None:
        """Adds to `counts` how many bits are 1 in each pixel of an image: see images.py.

        Args:
            bits: Of a matrix.
            begin: The first element of the image, in row-major order.
            end: The end of the elements to count.
            stride: Columns of the matrix.
            rows: Rows of the matrix in the image.
            columns: Columns of the matrix in the image.
            counts: (height, width), at most (rows, columns); added to.
        """

    def fold(self, values: Tensor, kept: Tensor) -> None:
        """Sets the values, (n,), that are not kept to zero of their own sign.

        Args:
            values: Of any dtype that can be pruned; written to.
            kept: The bits of a mask.
        """

    def power_sums(self, values: Tensor, first: int, last: int, p: float) -> Tensor:
        """Sums |x|^p of slices by halves: see row_sums.

        Args:
            values: Floating, (outer, slices, inner), with elements.
            first: The first slice.
            last: The end of the slices.
            p: Finite, not 0.

        Returns:
            float64, (last - first,).
        """

    def largest(self, keys: Tensor, n: int) -> Tensor:
        """Finds the `n` largest keys of each group, of equal ones those with a higher index.

        Args:
            keys: Integers, (groups, m, inner), where a group lies along the second dimension.
            n: In [0, m].

        Returns:
            Bool, of the same shape.
        """
