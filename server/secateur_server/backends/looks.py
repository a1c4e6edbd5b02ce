"""What a first look at a tensor tells, taken while its bytes arrive or are read."""

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
class Look:
    """A look at a part of a flat tensor: where it ends, its smallest and its largest key."""

    end: int
    smallest: int
    largest: int
    sample: Sample | None = None


class Seen(NamedTuple):
    """What a first look at a flat tensor told.

    largest: the largest key of its elements.
    zeros: [begin, end), multiples of 8, in their order, in which all elements are that are 0.
    sample: of its elements, where to read them once more takes long.
    """

    largest: int
    zeros: tuple[tuple[int, int], ...]
    sample: Sample | None


def seen_each(values: Tensor, begins: npt.NDArray[np.int64]) -> list[Seen]:
    """What a look at all of many tensors, none of them empty, tells.

    values: of all of them, floating, 1-D, on the CPU.  begins: where each begins.
    """
    bits: Any = values.view(BITS[values.dtype]).numpy()
    keys = bits & np.iinfo(bits.dtype).max
    least = np.minimum.reduceat(keys, begins).tolist()
    most = np.maximum.reduceat(keys, begins).tolist()
    sizes = np.diff(begins, append=len(keys)).tolist()
    return [
        Seen(largest, () if smallest else ((0, -(-size // 8) * 8),), None)
        for smallest, largest, size in zip(least, most, sizes, strict=True)
    ]


def seen_of(looks: Sequence[Look]) -> Seen | None:
    """What looks at all parts of a tensor, in their order, come to; None where there are none."""
    if not looks:
        return None
    zeros: list[tuple[int, int]] = []
    begin = 0
    for look in looks:
        if look.smallest == 0:
            first, last = begin // 8 * 8, -(-look.end // 8) * 8
            if zeros and zeros[-1][1] >= first:
                first, _ = zeros.pop()
            zeros.append((first, last))
        begin = look.end
    samples = [look.sample for look in looks if look.sample]
    sample = None
    if samples:
        places = torch.cat([sample.at for sample in samples])
        sample = Sample(places, torch.cat([sample.values for sample in samples]))
    return Seen(max(look.largest for look in looks), tuple(zeros), sample)
