"""Files under their digests: written once, checked whenever they are read.

A blob is BLAKE3 -> bytes. Beside it lie its sums, the BLAKE3 of each block of 1 MiB, so that a
reader checks what it reads and need not read the rest. Both are on disk before anything names them.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3

from secateur_server.backends.faults import Torn
from secateur_server.backends.mapping import map_file
from secateur_server.errors import DataLoss, StoreFailed, TakenOver, quote
from secateur_server.runtime.disk import (
    NO_RESOURCES,
    DurableFile,
    blocks_of,
    disk_errors,
    sync_folder,
)

BLOCK = 1 << 20
_SUM_BYTES = 32


def sums_bytes(size: int) -> int:
    """Bytes of the sums of a blob of `size` bytes."""
    return -(-size // BLOCK) * _SUM_BYTES


def disk_bytes(size: int) -> int:
    """What a blob of `size` bytes takes on disk, with its sums."""
    return blocks_of(size) + blocks_of(sums_bytes(size))


class StagedFile:
    """A file on its way into the store, in a folder of such files.  Errors: StoreFull, StoreFailed.

    Where its disk fails once it is lost: the system may have dropped what it could not write, and
    says so only once.

    The file exists from the first byte on. Several calls may have a part, of which one has taken
    it over from another: no two threads are at its file at once.

    Attributes:
        size: Bytes that have been written.
        reserved: Bytes that it may take on disk; the store counts them.
    """

    def __init__(self, path: Path) -> None:
        self.size = self.reserved = 0
        self._busy = threading.Lock()
        self._is_discarded = self._is_lost = False
        self._path = path
        self._whole, self._block, self._sums = blake3(), blake3(), bytearray()
        self._file: FileIO | None = None

    def rest(self) -> None:
        """Closes the file until the next byte comes: a process may have only so many open."""
        with self._busy, self._losing():
            if self._file:
                self._disk.sync()  # whoever opens it again may not be told what failed before
            self._close()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """The block is at the disk: where it fails the part is lost."""
        if self._is_discarded:
            raise TakenOver("data", "another call of the same caller has ended this upload")
        if self._is_lost:
            raise StoreFailed("data", "the store's disk failed before; send it again")
        try:
            with disk_errors():
                yield
        except BaseException:
            self._is_lost = True
            raise

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file is None:
            self._file = FileIO(self._path, "r+" if self.size else "x")
            self._file.seek(self.size)
            self._disk = DurableFile(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data`."""
        with self._busy, self._losing():
            self._open()
            self._write(memoryview(data))

    def _write(self, view: memoryview) -> None:
        while view:
            count = self._disk.write(view[: BLOCK - self.size % BLOCK])
            self._whole.update(view[:count])
            self._block.update(view[:count])
            self.size += count
            view = view[count:]
            if self.size % BLOCK == 0:
                self._end_block()

    def _end_block(self) -> None:
        self._sums += self._block.digest()
        self._block = blake3()

    def digest(self) -> str:
        """The hex BLAKE3 of what was written."""
        return self._whole.hexdigest()

    def finish(self, blobs: Path) -> str:
        """Makes it a blob of the folder `blobs`, on disk.  Returns: its digest."""
        with self._busy, self._losing():
            self._open()
            return self._finish(blobs)

    def _finish(self, blobs: Path) -> str:
        if self.size % BLOCK:
            self._end_block()
        target = blobs / self.digest()
        sums = self._path.with_suffix(".sums")
        try:
            with sums.open("wb") as file:
                file.write(self._sums)
                file.flush()
                os.fsync(file.fileno())
            self._disk.sync()
            os.replace(sums, sums_path(target))
            os.replace(self._path, target)
            sync_folder(blobs)
        finally:
            sums.unlink(missing_ok=True)
            self._discard()
        return target.name

    def discard(self) -> None:
        """Leaves nothing of it."""
        with self._busy:
            self._discard()

    def _discard(self) -> None:
        self._is_discarded = True
        self._close()
        self._path.unlink(missing_ok=True)


def sums_path(blob: Path) -> Path:
    """Where the sums of a blob lie."""
    return blob.with_name(f"{blob.name}.sums")


def has_blob(blob: Path, size: int) -> bool:
    """Whether a blob of that size is there; what is in it is seen when it is read."""
    try:
        return (blob.stat().st_size, sums_path(blob).stat().st_size) == (size, sums_bytes(size))
    except FileNotFoundError:
        return False


def remove_blob(blob: Path) -> None:
    """Removes a blob. Who has opened it goes on reading."""
    for path in (blob, sums_path(blob)):
        with suppress(FileNotFoundError):
            path.unlink()


@dataclass(frozen=True)
class Blob:
    """A blob that is open to be read.

    of: what it belongs to, for errors.  data: the file in mapped memory; what is written there
    stays in this process.  torn: tells where it could not be read.
    damaged: is called where the blob is not what was stored.
    """

    of: str
    filename: str
    digest: str
    data: memoryview
    torn: Torn | None
    sums: bytes
    damaged: Callable[[], None]

    @property
    def block_count(self) -> int:
        """How many blocks it has."""
        return len(self.sums) // _SUM_BYTES

    def check(self, block: int) -> None:
        """Checks a block of BLOCK bytes.  Errors: DataLoss."""
        found = blake3(self.data[block * BLOCK : (block + 1) * BLOCK]).digest()
        if found != self.sums[block * _SUM_BYTES : (block + 1) * _SUM_BYTES]:
            self.damaged()
            raise _lost(self.of, self.filename, f"differs in the bytes from {block * BLOCK} on")

    def check_whole(self) -> None:
        """Checks that all that was read was there.  Errors: DataLoss."""
        if self.torn and self.torn.is_torn:
            self.damaged()
            raise _lost(self.of, self.filename, "could not be read to its end")

    def blocks(self, offset: int = 0) -> Iterator[bytes | memoryview]:
        """The bytes of the file from `offset` on, each checked, and not looked at again."""
        for block in range(offset // BLOCK, self.block_count):
            read = bytes(self.data[block * BLOCK : (block + 1) * BLOCK])
            if blake3(read).digest() != self.sums[block * _SUM_BYTES :][:_SUM_BYTES]:
                self.check(block)
            yield memoryview(read)[max(0, offset - block * BLOCK) :]


def open_blob(path: Path, size: int, of: str, filename: str, damaged: Callable[[], None]) -> Blob:
    """Opens a blob of `size` bytes.  Errors: DataLoss."""
    try:
        with path.open("rb") as file:
            data, torn = map_file(file.fileno())
        sums = sums_path(path).read_bytes()
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        damaged()
        raise _lost(of, filename, f"cannot be read: {error.strerror}") from None
    if len(data) != size or len(sums) != sums_bytes(size):
        damaged()
        raise _lost(of, filename, f"has {len(data)} bytes, stored were {size}")
    return Blob(of, filename, path.name, data, torn, sums, damaged)


def _lost(of: str, filename: str, what: str) -> DataLoss:
    return DataLoss(of, f"is not what was stored: its file {quote(filename)} {what}")
