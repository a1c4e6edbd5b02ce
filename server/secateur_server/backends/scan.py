"""Scans of tensors while their bytes arrive or are read: extremes, zeros and a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur_server.backends.keys import BITS
from secateur_server.backends.randomness import RandomScores, random_keys

# Of a sample one unit in so many is taken.
SPACING = 384


@dataclass(frozen=True)
class Sample:
    """Some elements of a flat tensor.  at: their places, int64.  values: as the tensor has them."""

    at: Tensor
    values: Tensor


@lru_cache(8)
def sample_places(count: int, spacing: int, device: torch.device) -> Tensor:
    """One place of each `spacing`, ascending.

    Where in its stretch each lies is as good as random: no pattern can be in step with it.
    """
    index = torch.arange(0, count, spacing, device=device)
    index += random_keys(RandomScores(0), index) % spacing
    return index[index < count]


@dataclass(frozen=True)
class PartScan:
    """A part of a flat tensor: where it ends, its smallest and its largest key."""

    end: int
    smallest: int
    largest: int
    sample: Sample | None = None


class Scan(NamedTuple):
    """What is known of a flat tensor from its arrival.

    Attributes:
        largest: The largest key of its elements.
        zeros: [begin, end), multiples of 8, ascending: all elements that are 0 lie in them.
        sample: Of its elements, where to read them once more takes long.
    """

    largest: int
    zeros: tuple[tuple[int, int], ...]
    sample: Sample | None


def scan_each(values: Tensor, begins: npt.NDArray[np.int64]) -> list[Scan]:
    """Scans many tensors at once.

    Args:
        values: Of all tensors, floating, 1-D, on the CPU.
        begins: Where each tensor begins; none is empty.
    """
    bits: Any = values.view(BITS[values.dtype]).numpy()
    keys = bits & np.iinfo(bits.dtype).max
    least = np.minimum.reduceat(keys, begins).tolist()
    most = np.maximum.reduceat(keys, begins).tolist()
    sizes = np.diff(begins, append=len(keys)).tolist()
    return [
        Scan(largest, () if smallest else ((0, -(-size // 8) * 8),), None)
        for smallest, largest, size in zip(least, most, sizes, strict=True)
    ]


def joined_scan(parts: Sequence[PartScan]) -> Scan | None:
    """The scan of a tensor from those of its parts, in their order; None without parts."""
    if not parts:
        return None
    zeros: list[tuple[int, int]] = []
    begin = 0
    for part in parts:
        if part.smallest == 0:
            first, last = begin // 8 * 8, -(-part.end // 8) * 8
            if zeros and zeros[-1][1] >= first:
                first, _ = zeros.pop()
            zeros.append((first, last))
        begin = part.end
    samples = [part.sample for part in parts if part.sample]
    sample = None
    if samples:
        places = torch.cat([sample.at for sample in samples])
        sample = Sample(places, torch.cat([sample.values for sample in samples]))
    return Scan(max(part.largest for part in parts), tuple(zeros), sample)
