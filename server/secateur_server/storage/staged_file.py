"""Files that are being received into the store, before they are blobs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from blake3 import blake3

from secateur_server.errors import StoreFailed, TakenOver
from secateur_server.runtime.disk import DurableFile, disk_errors, sync_folder, write_synced
from secateur_server.storage.blobs import BLOCK, sums_path


class StagedFile:
    """A file that is being received. Its file on disk is created with the first byte.

    After a disk error the staged file is lost: the kernel may have dropped the data that it could
    not write, and reports this only once. So methods raise StoreFull or StoreFailed from the first
    failure of the disk on, and TakenOver once the file has been discarded.

    Several calls may have a staged file, since a newer call takes it over from an older one. A lock
    keeps two threads from using it at once.

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

    def suspend(self) -> None:
        """Closes the file until the next write, since a process has few file descriptors."""
        with self._busy, self._lost_on_error():
            if self._file:
                self._disk.sync()  # a later descriptor would not report an earlier write error
            self._close()

    @contextmanager
    def _lost_on_error(self) -> Iterator[None]:
        if self._is_discarded:
            raise TakenOver("data", "another call of this caller has ended the upload")
        if self._is_lost:
            raise StoreFailed("data", "the store's disk failed earlier; send it again")
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
        with self._busy, self._lost_on_error():
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
        """The hex BLAKE3 of the bytes written so far."""
        return self._whole.hexdigest()

    def finish(self, blobs: Path) -> None:
        """Makes the file a blob in the folder `blobs`, synced to disk."""
        with self._busy, self._lost_on_error():
            self._open()
            self._finish(blobs)

    def _finish(self, blobs: Path) -> None:
        if self.size % BLOCK:
            self._end_block()
        target = blobs / self.digest()
        sums = self._path.with_suffix(".sums")
        try:
            write_synced(sums, self._sums)
            self._disk.sync()
            os.replace(sums, sums_path(target))
            os.replace(self._path, target)
            sync_folder(blobs)
        finally:
            sums.unlink(missing_ok=True)
            self._discard()

    def discard(self) -> None:
        """Removes the file."""
        with self._busy:
            self._discard()

    def _discard(self) -> None:
        self._is_discarded = True
        self._close()
        self._path.unlink(missing_ok=True)
