"""The blobs of a store: each once, for as long as anything uses it."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Condition

from secateur_server.errors import RequestError
from secateur_server.runtime.disk import disk_errors
from secateur_server.storage.accounts import Entry
from secateur_server.storage.blobs import (
    Blob,
    StagedFile,
    disk_bytes,
    has_blob,
    open_blob,
    remove_blob,
)
from secateur_server.storage.records import StoredFile
from secateur_server.storage.references import References

log = logging.getLogger(__name__)


@dataclass
class Trash:
    """What nothing uses any more, to be removed once the store's lock is released.

    Attributes:
        entries: Checkpoints whose records are to be removed.
        blobs: Digests, as Shelf.release returned them.
    """

    entries: list[Entry] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    parts: list[StagedFile] = field(default_factory=list)


class BlobFolder:
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

    def rescue(self, trash: Trash) -> None:
        """Takes blobs that are used again out of `trash`.  The caller has the lock."""
        rescued = [digest for digest in trash.blobs if digest in self.references]
        trash.blobs = [digest for digest in trash.blobs if digest not in self.references]
        self._end_removal(rescued)

    def remove(self, trash: Trash) -> None:
        """Removes parts and blobs from the disk; the next start removes what the disk does not.

        The caller must not have the lock, as this takes a while, and has removed the records: no
        crash may leave one without its blobs.
        """
        try:
            with suppress(RequestError):  # the log has it
                self._check_folder()  # another server may have the same blobs
                for part in trash.parts:
                    _remove(part.discard)
                for digest in trash.blobs:
                    _remove(partial(remove_blob, self.folder / digest))
        finally:
            with self._lock:
                self._damaged.difference_update(trash.blobs)
                self._end_removal(trash.blobs)

    def _end_removal(self, digests: Iterable[str]) -> None:
        self.removing_bytes -= sum(self._removing.pop(digest) for digest in digests)
        self._lock.notify_all()

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is there, and nothing is known against it."""
        return digest not in self._damaged and has_blob(self.folder / digest, size)

    def put(self, part: StagedFile) -> None:
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


def _remove(remove: Callable[[], None]) -> None:
    with suppress(RequestError), disk_errors():  # the log has it
        remove()
