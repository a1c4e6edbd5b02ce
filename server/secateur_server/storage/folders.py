"""The folder of a store: whose it is, how much it may hold, and where it is if nobody says."""

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from secateur_server.errors import StoreFailed

log = logging.getLogger(__name__)


class StoreInUse(Exception):
    """Another server has the folder."""


class FolderLock:
    """Keeps other servers away from a folder until it is closed.

    The folder itself is locked. A lock on a file in it ends when somebody removes the file; but
    servers of earlier versions know only that lock, so it is taken too.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StoreInUse."""
        self._folder = folder
        try:
            with ExitStack() as opened:
                self._fd = _locked(folder, os.O_RDONLY | os.O_DIRECTORY, opened)
                _locked(folder / "lock", os.O_RDWR | os.O_CREAT, opened)
                self._opened = opened.pop_all()
        except BlockingIOError:
            raise StoreInUse(f"another server keeps its checkpoints in {folder}") from None

    @property
    def is_in_place(self) -> bool:
        """Whether the folder's path still leads to the folder that is locked."""
        try:
            return os.path.samestat(os.stat(self._folder), os.fstat(self._fd))
        except OSError:
            return False

    def check(self) -> None:
        """Refuses to use another folder, which another server may have.

        Raises:
            StoreFailed: The folder was moved, removed or replaced.
        """
        if not self.is_in_place:
            log.error(
                "%s is not the folder that the server opened: it was moved, removed or replaced; "
                "put it back, or restart the server",
                self._folder,
            )
            raise StoreFailed(
                "data",
                "the store's folder was moved or replaced; the operator has to put it back, or to "
                "restart the server",
            )

    def close(self) -> None:
        """Lets other servers in."""
        self._opened.close()


def _locked(path: Path, flags: int, opened: ExitStack) -> int:
    """The descriptor of a file or folder that this process has locked.  Raises BlockingIOError."""
    descriptor = os.open(path, flags, 0o600)
    opened.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def default_max_bytes(folder: Path) -> int:
    """Three quarters of what is free on the disk of a store, and of what it has there already.

    Of what is free alone it would be less with each start, and drive out what was kept.
    """
    held = 0
    with suppress(FileNotFoundError), os.scandir(folder / "blobs") as blobs:
        held = sum(blob.stat().st_size for blob in blobs)
    return (shutil.disk_usage(folder).free + held) * 3 // 4


def temporary_folder() -> Path:
    """A private folder for a store that ends with its server. Removes those left behind."""
    for path in Path(tempfile.gettempdir()).glob("secateur-store-*"):
        # A folder without blobs is new: its server is about to lock it.
        if (path / "blobs").exists():
            with suppress(OSError, StoreInUse), closing(FolderLock(path)):
                shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix="secateur-store-"))
