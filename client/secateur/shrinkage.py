"""What a shrunk model lost."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from secateur.decoding import decoded
from secateur.tables import listed
from secateur.tensors import LocalTensor
from secateur_proto import report_pb2 as pb
from secateur_proto.dtypes import DTYPES

# Names in a line for people.
_SHOWN = 3


@dataclass(frozen=True)
class ShrunkTensor:
    """The sizes of a tensor before and after.

    Attributes:
        shape_before: Its shape before.
        shape: Its shape now.
        bytes_before: The size of its values before.
        bytes: The size of its values now.
    """

    shape_before: tuple[int, ...]
    shape: tuple[int, ...]
    bytes_before: int
    bytes: int


@dataclass(frozen=True)
class ShrunkGroup:
    """The units of a group.

    Attributes:
        units: How many there were.
        kept: The indices of the units that were kept.
        removed: The indices of the units that were removed.
    """

    units: int
    kept: tuple[int, ...]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Uncut:
    """Slices that are wholly zero, and were not removed.

    Attributes:
        tensor: The name of a tensor.
        dim: The dimension of the slices.
        slices: How many there are.
        reason: Why they were not removed.
    """

    tensor: str
    dim: int
    slices: int
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.slices:,} zero slices of dim {self.dim} kept: {self.reason}"


@dataclass(frozen=True)
class Shrinkage:
    """What a shrunk model lost.

    Attributes:
        tensors: Each tensor that a group names, by its name.
        groups: Each group, by its name.
        parameters_before: Elements of all tensors of the model before.
        parameters: Elements of all tensors now.
        bytes_before: Bytes of the values of all tensors before.
        bytes: Bytes of the values of all tensors now.
        uncut: Slices that are wholly zero, and were not removed.
    """

    tensors: Mapping[str, ShrunkTensor]
    groups: Mapping[str, ShrunkGroup]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    uncut: tuple[Uncut, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        groups = [len(group.removed) for group in self.groups.values()]
        units = sum(group.units for group in self.groups.values())
        sizes = [
            ("parameters", self.parameters_before, self.parameters),
            ("bytes", self.bytes_before, self.bytes),
        ]
        changes = [
            f"{before:,} -> {now:,} {what} ({now / max(1, before):.1%})"
            for what, before, now in sizes
        ]
        removed = f"{sum(groups):,} of {units:,} units of {len(groups):,} groups removed"
        yield f"shrunk: {', '.join(changes)}; {removed}"
        yield from map(str, self.uncut[:_SHOWN])
        more = listed([uncut.tensor for uncut in self.uncut[_SHOWN:]], _SHOWN)
        if more:
            yield f"zero slices kept as well: {more}"


def add_unsent(message: pb.Shrinkage, tensors: Iterable[LocalTensor]) -> None:
    """Counts tensors of the model that the server did not see, and which are as they were."""
    for tensor in tensors:
        elements = math.prod(tensor.shape)
        size = elements * DTYPES[tensor.dtype].bits // 8
        message.parameters_before += elements
        message.parameters += elements
        message.bytes_before += size
        message.bytes += size


def decode_shrinkage(message: pb.Shrinkage) -> Shrinkage:
    """Decodes what was removed."""
    return decoded(
        Shrinkage,
        message,
        tensors={tensor.name: decoded(ShrunkTensor, tensor) for tensor in message.tensors},
        groups={group.name: _group(group) for group in message.groups},
        uncut=tuple(decoded(Uncut, uncut) for uncut in message.uncut),
    )


def _group(message: pb.ShrunkGroup) -> ShrunkGroup:
    bits = np.frombuffer(message.mask, np.uint8)
    kept = np.unpackbits(bits, count=message.units, bitorder="little").astype(bool)
    indices = (np.flatnonzero(kept), np.flatnonzero(~kept))
    return ShrunkGroup(message.units, *(tuple(map(int, found)) for found in indices))
