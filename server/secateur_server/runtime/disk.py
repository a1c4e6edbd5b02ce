"""Writes files durably, and turns disk errors into errors of the request."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur_server.errors import StoreFailed, StoreFull

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Bytes of a block of most file systems: a file takes whole blocks, and a folder at least one.
DISK_BLOCK = 4096

# Errors that say nothing about a file: the process or the system has no descriptor or memory left.
NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def blocks_of(size: int) -> int:
    """Bytes that a file of `size` bytes takes on disk."""
    return -(-size // DISK_BLOCK) * DISK_BLOCK


@contextmanager
def full_disk() -> Iterator[None]:
    """Raises StoreFull if the block fails because the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull(
            "data", f"the store's disk is full: {error.strerror}; delete checkpoints"
        ) from None


@contextmanager
def disk_errors(advice: str = "send it again") -> Iterator[None]:
    """Raises StoreFull if the block fails because the disk is full, else StoreFailed."""
    try:
        with full_disk():
            yield
    except OSError as error:
        if error.errno in NO_RESOURCES:
            raise
        if error.errno != errno.EFAULT:  # that is a source which was truncated while it was read
            log.error("the store's disk failed: %s", error)
        raise StoreFailed("data", f"the store's disk failed: {error.strerror}; {advice}") from None


# Bytes that are written before a sync, so that no sync takes long and cancellation is seen soon.
_SYNC_BYTES = 128 << 20


class DurableFile:
    """Writes an open file, which is on disk once `sync` returns."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        self._waiting = 0

    def write(self, data: memoryview) -> int:
        """Writes some of `data`, and returns how many bytes."""
        count = os.write(self._fd, data)
        self._waiting += count
        if self._waiting >= _SYNC_BYTES:
            self.sync()
        return count

    def sync(self) -> None:
        """Waits until all written bytes are on disk."""
        os.fsync(self._fd)
        self._waiting = 0


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file atomically and durably: after a crash it is the new one or the old one.

    Raises:
        StoreFull, StoreFailed: The disk failed.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with disk_errors():
            write_synced(unfinished, data)
            os.replace(unfinished, path)
            sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes | bytearray) -> None:
    """Writes a file, and waits until it is on disk. Its name may not be yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
