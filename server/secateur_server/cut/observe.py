"""Observes pieces: summaries of their keys, which are small and add up over pieces.

A summary is a histogram: how many candidates have each digit of a key, or lie between given keys,
and, where it is asked for, the sum of their squares. A sample of the keys bounds the cut before the
first pass over a large tensor.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import spans
from secateur_server.backends.keys import BITS
from secateur_server.backends.pieces import DIGIT_BITS, Ints, Observed, Piece
from secateur_server.backends.protocol import Backend
from secateur_server.backends.scan import sample_places
from secateur_server.cut.drivers import Driver
from secateur_server.cut.score import Ranked, score_dtype
from secateur_server.runtime.context import RequestContext

# Counts in all histograms of a pass, 8 bytes each: the most, the most of a place elsewhere, and
# units of the pass for each count, so that histograms do not take longer than the pass. Digits of
# LEAST_BITS are allowed for any number of units.
MOST_COUNTS = 1 << 24
MOST_COUNTS_OF_PLACE = 1 << 17
UNITS_OF_COUNT = 16
LEAST_BITS = 8


@dataclass(frozen=True)
class Histogram:
    """For each prefix the candidates of a member up to each digit.

    Attributes:
        rows: The row of each prefix, ascending.
        up_to: (prefixes, digits).
    """

    rows: dict[int, int]
    up_to: Ints


@dataclass(frozen=True)
class _Chunk:
    """Pieces of a member that one thread counts, compared as `dtype`. `prefixes` are ascending."""

    member: int
    dtype: torch.dtype
    prefixes: Sequence[int]
    pieces: Sequence[Observed]

    @property
    def place(self) -> object:
        """Where the pieces are. Members without units have none."""
        return self.pieces[0].place if self.pieces else None


def observe_digits(
    context: RequestContext,
    driver: Driver,
    members: Sequence[Sequence[Observed]],
    prefixes: Sequence[set[int]],
    left: int,
    dtype: torch.dtype,
    is_last: bool,
) -> tuple[dict[int, Histogram], int]:
    """Makes histograms of the next digit after the prefixes of each member, in one pass.

    Wider digits need fewer passes and larger histograms.

    Args:
        context: The request.
        driver: Of the pieces.
        members: The pieces of each member.
        prefixes: The prefixes that are counted in each member.
        left: Bits of the keys after the prefixes.
        dtype: In which all scores are compared.
        is_last: Whether the other digits are probably not needed, so that this one is to be wide.

    Returns:
        The histogram of each member with prefixes, and the bits of the digit.
    """
    units = sum(piece.units for member in members for piece in member)
    # Several chunks a thread end at about the same time; each has a histogram.
    chunks = _chunks(context, members, dtype, prefixes, driver.threads * (1 if is_last else 4))
    count = sum(len(chunk.prefixes) for chunk in chunks)
    most = min(MOST_COUNTS // count, MOST_COUNTS_OF_PLACE // max(1, _most_rows_elsewhere(chunks)))
    width = _width(units, count, most, left, is_last)
    parts = driver.map(context, partial(_count_digits, shift=left - width, width=width), chunks)
    histograms: dict[int, Histogram] = {}
    for chunk, part in zip(chunks, parts, strict=True):
        if chunk.member in histograms:
            np.add(histograms[chunk.member].up_to, part, histograms[chunk.member].up_to)
        else:
            rows = {prefix: row for row, prefix in enumerate(chunk.prefixes)}
            histograms[chunk.member] = Histogram(rows, part)
    return histograms, width


def _count_digits(
    context: RequestContext, backend: Backend, chunk: _Chunk, shift: int, width: int
) -> Ints:
    """Counts the candidates up to each digit of `width` bits at `shift`."""
    wanted = torch.tensor(chunk.prefixes, dtype=BITS[chunk.dtype])
    size = len(wanted), 1 << width
    counts = torch.zeros(size, dtype=torch.int64, device=backend.device)
    for observed in context.each(chunk.pieces):
        for piece in context.each(observed.read(context)):
            backend.count_digits(piece, wanted, shift, width, counts)
    running: Ints = torch.cumsum(counts, 1, out=counts).cpu().numpy()
    return running


def _chunks(
    context: RequestContext,
    members: Sequence[Sequence[Observed]],
    dtype: torch.dtype,
    prefixes: Sequence[set[int]],
    count: int,
) -> list[_Chunk]:
    """The pieces of each member that has prefixes, in about `count` chunks."""
    observed = [i for i, wanted in enumerate(context.each(prefixes)) if wanted]
    size = max(1, -(-sum(len(members[i]) for i in observed) // count))
    return [
        _Chunk(i, dtype, sorted(prefixes[i]), members[i][begin:end])
        for i in observed
        for begin, end in spans(len(members[i]) or 1, size)  # without units: counts of 0
    ]


def _most_rows_elsewhere(chunks: Sequence[_Chunk]) -> int:
    """The most rows of the histograms that another process returns."""
    rows: Counter[object] = Counter()
    for chunk in chunks:
        if chunk.place is not None:
            rows[chunk.place] += len(chunk.prefixes)
    return max(rows.values(), default=0)


def _width(units: int, rows: int, most: int, left: int, is_last: bool) -> int:
    """The bits of the next digit: as many as fit, or fewer if that takes as many passes.

    Args:
        units: Of the pass.
        rows: Of all histograms.
        most: The most counts of a row.
        left: Bits that are not known yet.
        is_last: As for observe_digits.
    """
    if is_last:
        return (left - 1) % DIGIT_BITS + 1
    digits = min(most, max(units // UNITS_OF_COUNT // rows, 1 << LEAST_BITS))
    bits = min(left, DIGIT_BITS, max(1, digits.bit_length() - 1))
    return -(-left // -(-left // bits))


def observe_key(
    context: RequestContext, driver: Driver, members: Sequence[Sequence[Observed]], key: int
) -> list[list[tuple[int, int]]]:
    """Counts the candidates of each piece of each member with a key below `key`, and at it."""
    pieces = [piece for member in members for piece in member]
    found = iter(driver.map(context, partial(_count_below, key=key), pieces))
    return [[next(found) for _ in member] for member in members]


def _count_below(
    context: RequestContext, backend: Backend, observed: Observed, key: int
) -> tuple[int, int]:
    found = [backend.count_below(piece, key) for piece in context.each(observed.read(context))]
    return sum(below for below, _ in found), sum(equal for _, equal in found)


def observe_score(
    context: RequestContext, driver: Driver, rankings: Sequence[Ranked], value: float
) -> list[tuple[int, int]]:
    """Counts the candidates of each tensor with a score below `value`, and at it.

    If `value` is between two scores, the upper one counts as at it.
    """
    dtype, size = score_dtype(rankings), driver.backend.piece
    members = [ranking.pieces(dtype, size) for ranking in context.each(rankings)]
    found = observe_key(context, driver, members, _first_key(value, dtype))
    return [(sum(b for b, _ in member), sum(e for _, e in member)) for member in found]


def _first_key(value: float, dtype: torch.dtype) -> int:
    """The smallest key of a score that is not below `value`."""
    if value <= 0:
        return 0
    nearest = torch.tensor(value, dtype=torch.float64).to(dtype)
    key = int(nearest.view(BITS[dtype]))
    return key + 1 if float(nearest) < value else key


def observe_squares(
    context: RequestContext,
    driver: Driver,
    parts: Sequence[tuple[Piece, Tensor]],
    keys: Tensor,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Sums squares of the values of a tensor's candidates, by where they lie between keys.

    Args:
        context: The request.
        driver: Of the tensor.
        parts: Pieces with the values of their units, in their order. Their sizes must not depend on
            the device or its threads, as sums are rounded.
        keys: Ascending, distinct.

    Returns:
        Of each part, as Backend.sum_squares: the sums, and how many candidates they are of.
    """
    found = driver.map(context, partial(_sum_squares, keys=keys), parts)
    return [sums for sums, _ in found], [counts for _, counts in found]


def _sum_squares(
    context: RequestContext, backend: Backend, part: tuple[Piece, Tensor], keys: Tensor
) -> tuple[Tensor, Tensor]:
    return backend.sum_squares(*part, keys)


def observe_sample(
    context: RequestContext, driver: Driver, pieces: Sequence[Piece], size: int, spacing: int
) -> Tensor:
    """The keys of about one candidate in `spacing`. A piece has at most `size` units."""
    found = driver.map(context, partial(_sample, size=size, spacing=spacing), pieces)
    return torch.cat(found)


def _sample(
    context: RequestContext, backend: Backend, piece: Piece, size: int, spacing: int
) -> Tensor:
    return backend.sample(piece, sample_places(size, spacing, backend.device))
