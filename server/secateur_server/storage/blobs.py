"""Blobs: files named by their digests, written once and checked whenever they are read.

The name of a blob is the hex BLAKE3 of its bytes. Beside it lies a file of sums, the BLAKE3 of each
block of 1 MiB, so that a reader can check one block without reading the others. Both are synced
before a record names them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from secateur_server.backends.faults import TruncationGuard
from secateur_server.backends.mapping import map_file
from secateur_server.errors import DataLoss, quote
from secateur_server.runtime.disk import NO_RESOURCES, blocks_of

BLOCK = 1 << 20
_SUM_BYTES = 32


def sums_bytes(size: int) -> int:
    """The size of the sums of a blob of `size` bytes."""
    return -(-size // BLOCK) * _SUM_BYTES


def disk_bytes(size: int) -> int:
    """Bytes that a blob of `size` bytes takes on disk, with its sums."""
    return blocks_of(size) + blocks_of(sums_bytes(size))


def sums_path(blob: Path) -> Path:
    """The path of a blob's sums."""
    return blob.with_name(f"{blob.name}.sums")


def has_blob(blob: Path, size: int) -> bool:
    """Whether a blob of that size exists. Its content is checked when it is read."""
    try:
        return (blob.stat().st_size, sums_path(blob).stat().st_size) == (size, sums_bytes(size))
    except FileNotFoundError:
        return False


def remove_blob(blob: Path) -> None:
    """Removes a blob. Open readers can still read it."""
    for path in (blob, sums_path(blob)):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Blob:
    """A blob that is open for reading.

    Attributes:
        checkpoint: The name of its checkpoint, for errors.
        filename: The caller's name of the file.
        digest: Hex BLAKE3.
        data: The file in mapped memory, copy-on-write.
        guard: Knows whether the file was truncated; None if it is not mapped.
        sums: The BLAKE3 of each block, one after another.
        damaged: Called if the blob differs from what was stored.
    """

    checkpoint: str
    filename: str
    digest: str
    data: memoryview
    guard: TruncationGuard | None
    sums: bytes
    damaged: Callable[[], None]

    @property
    def block_count(self) -> int:
        """The number of blocks."""
        return len(self.sums) // _SUM_BYTES

    def check(self, block: int) -> None:
        """Checks a block of BLOCK bytes.

        Raises:
            DataLoss: The block differs from what was stored.
        """
        self._check(block, self._data_of(block))

    def _data_of(self, block: int) -> memoryview:
        return self.data[block * BLOCK : (block + 1) * BLOCK]

    def _check(self, block: int, data: bytes | memoryview) -> None:
        if blake3(data).digest() != self.sums[block * _SUM_BYTES : (block + 1) * _SUM_BYTES]:
            self.damaged()
            what = f"differs from byte {block * BLOCK} on"
            raise _lost(self.checkpoint, self.filename, what)

    def check_whole(self) -> None:
        """Checks that every page that was read could be read.

        Raises:
            DataLoss: The file is truncated, or its disk failed.
        """
        if self.guard and self.guard.is_truncated:
            self.damaged()
            raise _lost(self.checkpoint, self.filename, "is truncated or unreadable")

    def blocks(self, offset: int = 0) -> Iterator[bytes | memoryview]:
        """The checked bytes of the file from `offset` on. Copies, so that they cannot change."""
        for block in range(offset // BLOCK, self.block_count):
            data = bytes(self._data_of(block))
            self._check(block, data)
            yield memoryview(data)[max(0, offset - block * BLOCK) :]


def open_blob(
    path: Path, size: int, checkpoint: str, filename: str, damaged: Callable[[], None]
) -> Blob:
    """Opens a blob of `size` bytes. The other arguments are attributes of Blob.

    Raises:
        DataLoss: The blob is missing, or has another size.
    """
    try:
        with path.open("rb") as file:
            data, guard = map_file(file.fileno())
        sums = sums_path(path).read_bytes()
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        damaged()
        raise _lost(checkpoint, filename, f"cannot be read: {error.strerror}") from None
    if len(data) != size or len(sums) != sums_bytes(size):
        damaged()
        raise _lost(checkpoint, filename, f"has {len(data)} bytes, expected {size}")
    return Blob(checkpoint, filename, path.name, data, guard, sums, damaged)


def _lost(checkpoint: str, filename: str, what: str) -> DataLoss:
    return DataLoss(checkpoint, f"differs from what was stored: its file {quote(filename)} {what}")
