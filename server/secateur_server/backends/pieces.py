"""What backends work on: pieces of tensors, batches of small ones, cuts and layouts.

A mask is bits: uint8, row-major, lowest bit first, 1 is kept, the last byte padded with 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur_server.backends.keys import BITS, as_keys, picked, ranked_as
from secateur_server.backends.randomness import RandomScores
from secateur_server.runtime.context import RequestContext

Ints = npt.NDArray[np.int64]

DIGIT_BITS = 16

# Numbers are added up in parts of so many, whatever a device's pieces are, and the parts in their
# order: so neither device nor threads show.
PART = 1 << 20

# Powers that are products, and whose roots too, which all devices compute alike.
EXACT_POWERS = (0.5, 1, 2, 3)

# Bytes that each unit takes of those ranked at once: keys, places, their copies, and a flag.
BYTES_OF_FEW = 48


# A backend's own way to the keys of random scores, of so many units.
MakeRandom = Callable[[RandomScores, int], Tensor]


class Scores(Protocol):
    """The scores of units. There are stored ones, and RandomScores."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which they compare without loss."""

    @property
    def stored(self) -> Tensor | None:
        """The scores, 1-D; None if each is computed where it is needed."""

    @property
    def stream(self) -> tuple[int, int]:
        """The state of the random stream, and its first number; 0, 0 for stored scores."""

    def part(self, begin: int, end: int) -> "Scores":
        """Returns the scores of the units [begin, end)."""

    def keys(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        """Returns the keys of all units, compared as `dtype`; a tensor that may be written to."""

    def bits(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        """Returns integers that are the keys but for a sign, contiguous, not to be written to."""

    def keys_at(self, dtype: torch.dtype, index: Tensor) -> Tensor:
        """Returns the keys of the units at an index, compared as `dtype`."""


class Stored(NamedTuple):
    """Scores in memory. `stored` is 1-D, of any dtype that can be pruned."""

    stored: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return ranked_as(self.stored.dtype)

    @property
    def stream(self) -> tuple[int, int]:
        return 0, 0

    def part(self, begin: int, end: int) -> "Stored":
        return Stored(self.stored[begin:end])

    def keys(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        return as_keys(self.stored, dtype)

    def bits(self, dtype: torch.dtype, units: int, make_random: MakeRandom) -> Tensor:
        return self.stored.to(dtype).contiguous().view(BITS[dtype])

    def keys_at(self, dtype: torch.dtype, index: Tensor) -> Tensor:
        return as_keys(picked(self.stored, index), dtype)


@dataclass(frozen=True)
class Piece:
    """Units of a tensor in their order, to be ranked by the absolute value of their scores.

    Attributes:
        units: How many.
        scores: Of these units.
        dtype: What they are compared as, as of Scores.dtype.
        unpruned: Bits, 0 is pruned already; None: no unit is.
    """

    units: int
    scores: Scores
    dtype: torch.dtype
    unpruned: Tensor | None

    @property
    def place(self) -> None:
        """As of Observed."""
        return

    def read(self, context: RequestContext) -> "Sequence[Piece]":
        """Returns the piece itself, which is in memory."""
        return (self,)


class Observed(Protocol):
    """Units that are read where the task runs: a Piece, or a reference to pieces elsewhere."""

    @property
    def units(self) -> int:
        """How many."""

    @property
    def place(self) -> object:
        """What tells a driver where they are: equal for equal places. None: in this process."""

    def read(self, context: RequestContext) -> Sequence[Piece]:
        """Returns the units as pieces, in their order."""


@dataclass(frozen=True)
class Batch:
    """Units of small tensors side by side on the CPU, each from a new byte of the mask on.

    Attributes:
        bits: The integers that have the bits of their scores, or random ones; 1-D.
        dtype: What the scores are compared as.
        unpruned: uint8: a bit for each unit; 0 is pruned already, or between two tensors.
        begins: Where each tensor begins in `bits`, a multiple of 8.
        units: Of each tensor.
    """

    bits: Tensor
    dtype: torch.dtype
    unpruned: Tensor
    begins: Ints
    units: Ints


@dataclass(frozen=True)
class Cut:
    """Prune the units with keys below `key`, and the first `ties` of the `equal` ones at it."""

    key: int
    ties: int
    equal: int


@dataclass(frozen=True)
class Split:
    """Pieces between two bounds.

    Attributes:
        kept: Bits: the units at the upper bound or above. Each piece begins with a new byte.
        above: How many they are.
        keys: Of the units between the bounds.
        at: Their places in `kept`, int32 or int64.
    """

    kept: Tensor
    above: int
    keys: Tensor
    at: Tensor


@dataclass(frozen=True)
class Layouts:
    """Where the ones of masks lie.

    Attributes:
        ones: How many each mask has.
        nonzero_slices: For each dimension how many slices have one; of all masks, one behind
            another.
        most_ones: (masks, 4), as of Backend.most_ones along the second dimension, or the only one.
        nonzero_blocks: (masks, 4), as of Backend.nonzero_blocks of the matrix of the first
            dimension and all others; 0 under 2 dimensions.
    """

    ones: Ints
    nonzero_slices: Ints
    most_ones: Ints
    nonzero_blocks: Ints


def around(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """The elements before, along and behind a dimension."""
    dim %= len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def bits_at(bits: Tensor, index: Tensor) -> Tensor:
    """The bits at `index` as bool, in its shape."""
    return ((bits[index >> 3] >> (index & 7)) & 1).to(torch.bool)


def row_sums(rows: Tensor) -> Tensor:
    """Sums of rows by halves, in an order that depends on their length alone.

    torch's own sum adds in an order of its threads, its vectors and its device.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        odd = rows[:, 2 * half :]
        rows = rows[:, :half] + rows[:, half : 2 * half]
        rows[:, :1] += odd if odd.shape[1] else 0.0
    return rows[:, 0]
