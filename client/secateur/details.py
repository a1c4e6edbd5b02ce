"""What a page shows of a tensor: histogram, images of the zeros, N:M groups and zero slices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.checks import flag
from secateur_proto import report_pb2 as pb

# The most bytes of the details of a report: a page that has them as base64 stays below 10 MB.
_MOST_BYTES = 6 << 20

Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Weights by their magnitude |w|, in bins of equal width from 0 to the largest.

    Weights that a mask prunes are counted as they were before. Of a shrunk result the counts are of
    the whole tensor.

    Attributes:
        largest: The largest finite magnitude.
        kept: For each bin, weights that are finite, not zero, and not pruned by a mask.
        pruned: For each bin, weights that are finite, not zero, and pruned by a mask.
        zeros: Weights that are zero themselves, pruned or not.
        non_finite: Weights that are infinite or NaN, pruned or not.
    """

    largest: float
    kept: Counts
    pruned: Counts
    zeros: int
    non_finite: int


@dataclass(frozen=True, eq=False)
class Image:
    """Which elements of the first rows and columns of a matrix are not zero.

    Attributes:
        rows: The rows of the matrix that the image shows.
        columns: The columns of the matrix that the image shows.
        pixels: One pixel for each element, bool, True is not zero; or uint8, the share of a pixel's
            elements that are not zero: 0 is none, 255 is all. Of `height` rows of pixels, row i
            begins with the matrix's row i * rows // height; so do columns.
    """

    rows: int
    columns: int
    pixels: npt.NDArray[np.bool_] | npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TensorDetails:
    """The details of one tensor.

    Attributes:
        histogram: Its weights by their magnitude.
        groups: For m = 2, 4, 8 and 16, m + 1 counts: at n, the groups of m elements side by side,
            as `TensorReport.patterns` has them, of which n are not zero.
        images: The tensor as a matrix of its first dimension and all others (of one dimension: one
            row), from the whole to single elements. Empty if no element is zero.
        zero_slices: By dimension, if it has any: which slices are wholly zero, of the first 65,536.
    """

    histogram: Histogram
    groups: Mapping[int, Counts]
    images: tuple[Image, ...]
    zero_slices: Mapping[int, Flags]

    def share(self, n: int, m: int) -> float:
        """The share of the groups of m elements in which at most n are not zero.

        Args:
            n: In [0, m].
            m: 2, 4, 8 or 16.
        """
        counts = self.groups[m]
        return float(counts[: n + 1].sum() / counts.sum())


def details_of(details: bool) -> pb.Details | None:
    """Makes the field of a header that asks for details, or not."""
    return pb.Details(max_bytes=_MOST_BYTES) if flag("details", details) else None


def decode_details(message: pb.TensorDetails, shape: tuple[int, ...]) -> TensorDetails:
    """Decodes the details of a tensor."""
    return TensorDetails(
        _histogram(message.histogram),
        {counts.m: _counts(counts.groups) for counts in message.groups},
        tuple(map(_image, message.images)),
        {slices.dim: _flags(slices.bits, shape[slices.dim]) for slices in message.zero_slices},
    )


def _histogram(message: pb.MagnitudeHistogram) -> Histogram:
    kept = _counts(message.kept)
    pruned = _counts(message.pruned) if message.pruned else np.zeros_like(kept)
    return Histogram(message.largest, kept, pruned, message.zeros, message.non_finite)


def _counts(numbers: Any) -> Counts:
    return np.array(numbers, np.int64)


def _image(message: pb.PatternImage) -> Image:
    size = message.height, message.width
    if message.bits:
        pixels: Any = _flags(message.bits, message.height * message.width).reshape(size)
    else:
        pixels = np.frombuffer(message.densities, np.uint8).reshape(size)
    return Image(message.rows, message.columns, pixels)


def _flags(bits: bytes, count: int) -> Flags:
    """At most `count` flags of packed bits."""
    packed = np.frombuffer(bits, np.uint8)
    flags = np.unpackbits(packed, count=min(count, 8 * len(packed)), bitorder="little")
    return flags.view(np.bool_)
