"""The folder of a store: its lock, its default size, and its default place."""

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
    """Another server uses the folder."""


class FolderLock:
    """An exclusive lock on the folder of a store, which exists, until the lock is closed.

    The folder itself is locked, since a lock on a file in it is lost if somebody removes the file.
    Servers of earlier versions know only the lock on the file `lock`, so it is taken too.

    Raises:
        StoreInUse: Another server has locked it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with ExitStack() as opened:
                self._fd = _locked(folder, os.O_RDONLY | os.O_DIRECTORY, opened)
                _locked(folder / "lock", os.O_RDWR | os.O_CREAT, opened)
                self._opened = opened.pop_all()
        except BlockingIOError:
            raise StoreInUse(f"another server uses {folder}") from None

    @property
    def is_in_place(self) -> bool:
        """Whether the folder's path still refers to the locked folder."""
        try:
            return os.path.samestat(os.stat(self._folder), os.fstat(self._fd))
        except OSError:
            return False

    def check(self) -> None:
        """Checks that the path still refers to the locked folder: another one may be in use.

        Raises:
            StoreFailed: The folder was moved, removed or replaced.
        """
        if not self.is_in_place:
            log.error(
                "%s is not the folder that the server opened: it was moved, removed or replaced; "
                "move it back, or restart the server",
                self._folder,
            )
            raise StoreFailed(
                "data",
                "the store's folder was moved or replaced; ask the operator to move it back, or to "
                "restart the server",
            )

    def close(self) -> None:
        """Releases the lock."""
        self._opened.close()


def _locked(path: Path, flags: int, opened: ExitStack) -> int:
    """Locks a file or folder. Returns its descriptor. Raises BlockingIOError."""
    descriptor = os.open(path, flags, 0o600)
    opened.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def default_max_bytes(folder: Path) -> int:
    """Three quarters of the disk's free space and the store's current size together.

    Three quarters of the free space alone would shrink with each start, and evict checkpoints.
    """
    held = 0
    with suppress(FileNotFoundError), os.scandir(folder / "blobs") as blobs:
        held = sum(blob.stat().st_size for blob in blobs)
    return (shutil.disk_usage(folder).free + held) * 3 // 4


def temporary_folder() -> Path:
    """Creates a private folder for a store that is removed with its server.

    Removes folders of earlier servers that no server uses any more.
    """
    for path in Path(tempfile.gettempdir()).glob("secateur-store-*"):
        # A folder without blobs is new, and its server is about to lock it.
        if (path / "blobs").exists():
            with suppress(OSError, StoreInUse), closing(FolderLock(path)):
                shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix="secateur-store-"))
