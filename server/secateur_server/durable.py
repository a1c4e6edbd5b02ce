"""Files that are on disk when a function returns, and disks that are full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur_server.errors import StoreFull

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk() -> Iterator[None]:
    """Raises StoreFull where the disk has no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StoreFull("data", f"the store's disk is full: {error.strerror}") from None


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file in its place: after a crash the new one is there, or what was there before.

    Errors: StoreFull.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with full_disk(), unfinished.open("wb") as file:
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
