"""Packs tensors: without their zeros, and compressed. Both ends do it here. It needs zstandard."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import zstandard

from secateur_proto.framing import cut, tensor_bytes
from secateur_proto.packed import BLOCK, METADATA, TABLE, VERSION, block_count, element_bytes

LEVEL = 3

# Bytes that packing must save, for it is described in the metadata; smaller tensors are not tried.
LEAST_SAVED = 128
# Bytes of blocks that are packed at once.
_BATCH_BYTES = 16 << 20

Bytes = bytes | memoryview
Item = TypeVar("Item")
Made = TypeVar("Made")


class Run(Protocol):
    """Maps a function over items, in any number of threads. Results are in order."""

    def __call__(
        self, function: Callable[[Item], Made], items: Iterable[Item], /
    ) -> Iterable[Made]:
        """Returns the results."""


@dataclass(frozen=True)
class Dense:
    """A tensor to pack.

    Attributes:
        name: Of the tensor.
        dtype: A key of DTYPES.
        shape: Of the tensor.
        parts: Returns its bytes in order, cut anywhere.
    """

    name: str
    dtype: str
    shape: Sequence[int]
    parts: Callable[[], Iterable[Bytes]]

    @property
    def size(self) -> int:
        """Bytes."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def blocks(self) -> int:
        """The blocks to pack; 0 for a tensor that is too small for it."""
        return block_count(self.size, element_bytes(self.dtype)) if self.size > LEAST_SAVED else 0


class Placed(NamedTuple):
    """A tensor of a packed file. Its bytes follow those of the tensor before it."""

    tensor: Dense
    size: int
    is_packed: bool

    def entry(self) -> tuple[str, str, Sequence[int]]:
        """Name, dtype and shape in the header of the file."""
        if self.is_packed:
            return self.tensor.name, "U8", (self.size,)
        return self.tensor.name, self.tensor.dtype, self.tensor.shape


def pack_all(
    tensors: Sequence[Dense], write: Callable[[int, Bytes], object], run: Run
) -> list[Placed]:
    """Packs tensors, and writes the data of a file. A tensor that gains little is copied.

    Args:
        tensors: In the order of the file.
        write: Writes bytes at an offset. No offset is behind the dense bytes of all tensors.
        run: Packs blocks.
    """
    frames, placed, begin = _frames(tensors, run), [], 0
    for tensor in tensors:
        size = _write_packed(tensor, islice(frames, tensor.blocks), begin, write)
        if size is None:
            _write_dense(tensor, begin, write)
        placed.append(Placed(tensor, tensor.size if size is None else size, size is not None))
        begin += placed[-1].size
    return placed


def _write_packed(
    tensor: Dense, frames: Iterable[bytes], begin: int, write: Callable[[int, Bytes], object]
) -> int | None:
    """Writes the table and the frames of a tensor. Returns their size; None: it gains little."""
    size, lengths = TABLE.itemsize * tensor.blocks, []
    for frame in frames:
        lengths.append(len(frame))
        if size + len(frame) <= tensor.size:
            write(begin + size, frame)
        size += len(frame)
    if not lengths or size + LEAST_SAVED > tensor.size:
        return None
    write(begin, np.array(lengths, TABLE).tobytes())
    return size


def _write_dense(tensor: Dense, begin: int, write: Callable[[int, Bytes], object]) -> None:
    for part in tensor.parts():
        write(begin, part)
        begin += len(part)


def _frames(tensors: Iterable[Dense], run: Run) -> Iterator[bytes]:
    """Packs the blocks of all tensors, batch by batch."""

    def pack(block: tuple[int, Bytes]) -> bytes:
        return pack_block(block[1], block[0])

    for batch in _batches(_blocks(tensors)):
        yield from run(pack, batch)


def _blocks(tensors: Iterable[Dense]) -> Iterator[tuple[int, Bytes]]:
    """The bytes of an element, and a block."""
    for tensor in tensors:
        if tensor.blocks:
            width = element_bytes(tensor.dtype)
            yield from ((width, block) for block in cut(tensor.parts(), BLOCK * width))


def _batches(blocks: Iterable[tuple[int, Bytes]]) -> Iterator[list[tuple[int, Bytes]]]:
    batch: list[tuple[int, Bytes]] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block[1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe(placed: Iterable[Placed]) -> dict[str, str]:
    """Returns the metadata that describes the packed tensors of a file."""
    table = {p.tensor.name: [p.tensor.dtype, list(p.tensor.shape)] for p in placed if p.is_packed}
    text = {"version": VERSION, "tensors": table}
    return {METADATA: json.dumps(text, separators=(",", ":"), ensure_ascii=False)}


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)


_OF_THREAD = _OfThread()


def pack_block(data: Bytes, width: int) -> bytes:
    """Packs up to BLOCK elements of `width` bytes into a frame.

    The frame holds the bits of a mask, the lowest first: 1 is an element with a bit other than its
    highest. Then, if any of the others has its highest bit set, such as -0.0: those bits. Then the
    lowest bytes of the elements of the mask, their second bytes, and so on.
    """
    bits = np.frombuffer(data, f"<u{width}")
    kept = (bits << 1) != 0
    signs = bits[~kept] != 0
    sections = [np.packbits(kept, bitorder="little")]
    if signs.any():
        sections.append(np.packbits(signs, bitorder="little"))
    planes = bits[kept].view(np.uint8).reshape(-1, width)
    sections += [np.ascontiguousarray(planes[:, place]) for place in range(width)]
    stream = _OF_THREAD.compressor.compressobj(size=sum(map(len, sections)))
    parts = []
    for section in sections:  # each has its own statistics
        parts += [stream.compress(section.data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, stream.flush()])
