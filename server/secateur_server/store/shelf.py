"""The blobs of a store: each once, for as long as anything uses it."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition

from secateur_server.durable import disk_errors, sync_folder
from secateur_server.store.blobs import Blob, Part, disk_bytes, has_blob, open_blob, remove_blob
from secateur_server.store.records import StoredFile
from secateur_server.store.references import References

log = logging.getLogger(__name__)


@dataclass
class Trash:
    """Files that nothing uses any more, to be removed once the store's lock is released.

    Attributes:
        blobs: Their digests, as Shelf.release returned them.
    """

    records: list[Path] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


class Shelf:
    """A folder of blobs.

    Args:
        folder: Of the blobs.
        lock: The store's.
        check_folder: Raises StoreFailed where the folder is not the store's any more.

    Attributes:
        references: Of checkpoints, uploads and calls.
        removing_bytes: Of blobs that are being removed, and are still on disk.
    """

    def __init__(self, folder: Path, lock: Condition, check_folder: Callable[[], None]) -> None:
        self.folder, self._check_folder = folder, check_folder
        self.references = References()
        self.removing_bytes = 0
        self._lock = lock
        self._removing: dict[str, int] = {}  # bytes by digest
        self._damaged: set[str] = set()

    def unknown(self) -> list[Path]:
        """What is in the folder and belongs to no file that is used."""
        names = os.listdir(self.folder)
        return [self.folder / n for n in names if n.removesuffix(".sums") not in self.references]

    def acquire(self, files: Iterable[StoredFile]) -> None:
        """Keeps blobs that exist, or are about to."""
        with self._lock:
            self.references.acquire(files)

    def release(self, files: Iterable[StoredFile]) -> list[str]:
        """Takes back `acquire`.

        Returns:
            The digests of blobs that nothing uses any more. The caller must pass them to `remove`.
        """
        with self._lock:
            unused = {file.blake3: disk_bytes(file.size) for file in self.references.release(files)}
            self._removing |= unused
            self.removing_bytes += sum(unused.values())
            return list(unused)

    def wait_until_removed(self, digest: str) -> None:
        """Waits, with the lock, while a blob is being removed that is about to be written anew."""
        while digest in self._removing:
            self._lock.wait()

    def remove(self, trash: Trash) -> None:
        """Removes files from the disk.  The caller must not have the lock: it takes a while.

        Records go first, and for good: no crash may leave one without its blobs.
        Errors: StoreFailed.
        """
        try:
            self._check_folder()  # another server may have the same blobs
            for part in trash.parts:
                part.discard()
            with disk_errors():
                remove_records(trash.records)
                for digest in trash.blobs:
                    remove_blob(self.folder / digest)
        finally:
            with self._lock:
                self.removing_bytes -= sum(self._removing.pop(digest) for digest in trash.blobs)
                self._damaged.difference_update(trash.blobs)
                self._lock.notify_all()

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is there, and nothing is known against it."""
        return digest not in self._damaged and has_blob(self.folder / digest, size)

    def put(self, part: Part) -> None:
        """Makes a part a blob.  Errors: StoreFull, StoreFailed, TakenOver."""
        self._check_folder()
        part.finish(self.folder)

    def renewed(self, digest: str) -> None:
        """A blob has been written anew."""
        self._damaged.discard(digest)

    def open(self, of: str, file: StoredFile) -> Blob:
        """Opens a blob.  of: what it belongs to, for errors.  Errors: DataLoss, StoreFailed."""
        self._check_folder()

        def damaged() -> None:
            log.error("%s is damaged: blob %s", of, file.blake3)
            self._damaged.add(file.blake3)

        return open_blob(self.folder / file.blake3, file.size, of, file.filename, damaged)


def remove_records(records: Iterable[Path]) -> None:
    """Removes records. They stay removed after a crash."""
    folders = set()
    for path in records:
        path.unlink(missing_ok=True)
        folders.add(path.parent)
    for folder in folders:
        sync_folder(folder)
