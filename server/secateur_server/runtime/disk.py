"""Files that are on disk when a function returns, and disks that are full."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur_server.errors import StoreFailed, StoreFull

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Of most file systems: a file takes whole ones.
DISK_BLOCK = 4096

# What says nothing about a file: the process, or the system, has no room to open one more.
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def blocks_of(size: int) -> int:
    """The bytes that a file of `size` bytes takes on disk."""
    return -(-size // DISK_BLOCK) * DISK_BLOCK


@contextmanager
def full_disk() -> Iterator[None]:
    """Raises StoreFull where the disk has no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull("data", f"the store's disk is full: {error.strerror}") from None


@contextmanager
def disk_errors(advice: str = "send it again") -> Iterator[None]:
    """Raises StoreFull where the disk has no room, and StoreFailed where it fails otherwise.

    Args:
        advice: What the caller of a request can do after a StoreFailed.
    """
    try:
        with full_disk():
            yield
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        log.error("the store's disk failed: %s", error)
        raise StoreFailed("data", f"the store's disk failed: {error.strerror}; {advice}") from None


# How much is written at most before the disk is waited for: no wait takes long, and a call that is
# to stop does.
_SYNC_BYTES = 128 << 20


class DurableFile:
    """Writes a file that is on disk once `sync` returns."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._waiting = 0

    def write(self, data: memoryview) -> int:
        """Writes some of `data`.  Returns: how many bytes."""
        count = os.write(self._fd, data)
        self._waiting += count
        if self._waiting >= _SYNC_BYTES:
            self.sync()
        return count

    def sync(self) -> None:
        """Waits for the disk."""
        os.fsync(self._fd)
        self._waiting = 0


def write_atomically(path: Path, data: bytes) -> None:
    """Puts a file in its place: after a crash the new one is there, or what was there before.

    Errors: StoreFull, StoreFailed.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with disk_errors(), unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            unfinished.unlink()
        raise


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
