"""Sums of inputs in float64, a piece at a time. Imported with torch only."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that are converted to float64 at once: measured on CPUs, whose allocator maps larger
# arrays anew each time. Other devices need more, to be busy.
PIECE = 1 << 19
_DEVICE_PIECE = 1 << 24


@dataclass(frozen=True)
class Sums:
    """Sums over rows.

    Attributes:
        count: Of the rows.
        totals: [3, channels], float64: the sums of x, x^2 and |x|.
    """

    count: int
    totals: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        totals = self.totals + other.totals.to(self.totals.device)
        return Sums(self.count + other.count, totals)


def pieces(values: Tensor, rows: int = 1, least: int = 1) -> Iterator[Tensor]:
    """Cuts values into matrices of limited size.

    Args:
        values: Their first `rows` dimensions become rows, the others columns.
        rows: See above.
        least: Matrices with so many rows are not too large.
    """
    if not values.numel():
        return
    columns = values[(0,) * rows].numel()
    limit = max(PIECE if values.is_cpu else _DEVICE_PIECE, least * columns)
    inner = values[0].numel()
    if rows > 1 and inner > limit:
        for part in values:
            yield from pieces(part, rows - 1, least)
        return
    for part in torch.split(values, max(1, limit // inner)):
        yield part.reshape(-1, columns)


def channel_sums(rows: Tensor) -> Sums:
    """Sums the columns of a matrix.

    Args:
        rows: [rows, channels], of any real dtype.
    """
    device = "cpu" if rows.device.type == "mps" else rows.device  # MPS has no float64
    totals = torch.zeros(3, rows.shape[1], dtype=torch.float64, device=device)
    for piece in pieces(rows):
        exact = piece.to(device).double()
        totals += torch.stack([exact.sum(0), exact.square().sum(0), exact.abs().sum(0)])
    return Sums(len(rows), totals)


def use_sums(ids: Tensor, size: int) -> Sums:
    """Counts the uses of the rows of a table: the sums of inputs that are 0 or 1.

    Args:
        ids: Of the rows, flat.
        size: How many rows the table has.
    """
    uses = torch.bincount(ids.cpu(), minlength=size).double()
    return Sums(len(ids), uses.expand(3, -1).clone())


def first_infinite(totals: Tensor) -> int | None:
    """Returns the first channel whose sums are not finite; None if all are."""
    wrong = ~totals.isfinite().all(0)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
