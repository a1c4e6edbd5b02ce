"""The folder of blobs: each blob exists once, as long as anything refers to it."""

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
from secateur_server.storage.blobs import Blob, disk_bytes, has_blob, open_blob, remove_blob
from secateur_server.storage.records import StoredFile
from secateur_server.storage.references import References
from secateur_server.storage.staged_file import StagedFile

log = logging.getLogger(__name__)


@dataclass
class Trash:
    """Unused files, to be removed once the store's lock is released.

    Attributes:
        entries: Checkpoints whose records are to be removed.
        blobs: Digests, as `BlobFolder.release` returned them.
        staged: Staged files of abandoned uploads.
        evicted: The evicted ones of `entries`, with the reason and the bytes that this frees.
    """

    entries: list[Entry] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    staged: list[StagedFile] = field(default_factory=list)
    evicted: list[tuple[Entry, str, int]] = field(default_factory=list)


class BlobFolder:
    """A folder of blobs with their reference counts, which the store's lock guards.

    Args:
        folder: The folder.
        lock: The store's lock.
        check_folder: Raises StoreFailed if the folder is not the store's any more.

    Attributes:
        references: Held by checkpoints, uploads and calls.
        removing_bytes: Bytes of blobs that are being removed, and are still on disk.
    """

    def __init__(self, folder: Path, lock: Condition, check_folder: Callable[[], None]) -> None:
        self.folder, self.check_folder = folder, check_folder
        self.references = References()
        self.removing_bytes = 0
        self._lock = lock
        self._removing: dict[str, int] = {}  # bytes by digest
        self._damaged: set[str] = set()

    def unknown(self) -> list[Path]:
        """Files in the folder that belong to no blob with a reference."""
        names = os.listdir(self.folder)
        return [self.folder / n for n in names if n.removesuffix(".sums") not in self.references]

    def acquire(self, files: Iterable[StoredFile]) -> None:
        """Adds references to blobs that exist, or are about to be created."""
        with self._lock:
            self.references.acquire(files)

    def release(self, files: Iterable[StoredFile]) -> list[str]:
        """Removes references to blobs.

        Returns:
            The digests of blobs without references, which the caller must pass to `remove`.
        """
        with self._lock:
            unused = {file.blake3: disk_bytes(file.size) for file in self.references.release(files)}
            self._removing |= unused
            self.removing_bytes += sum(unused.values())
            return list(unused)

    def wait_until_removed(self, digest: str) -> None:
        """Waits until a blob that is being removed is off the disk. The caller has the lock."""
        while digest in self._removing:
            self._lock.wait()

    def rescue(self, trash: Trash) -> None:
        """Takes blobs that have references again out of `trash`. The caller has the lock."""
        rescued = [digest for digest in trash.blobs if digest in self.references]
        trash.blobs = [digest for digest in trash.blobs if digest not in self.references]
        self._end_removal(rescued)

    def remove(self, trash: Trash) -> None:
        """Removes staged files and blobs. The next start of the server retries failed removals.

        The caller must not have the lock, since removal takes a while. It has removed the records
        before, so that a crash never leaves a record without its blobs.
        """
        try:
            with suppress(RequestError):  # logged where it is raised
                self.check_folder()  # another server may use a replaced folder
                for staged in trash.staged:
                    _remove(staged.discard)
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
        """Whether a blob exists and is not known to be damaged."""
        return digest not in self._damaged and has_blob(self.folder / digest, size)

    def put(self, staged: StagedFile) -> None:
        """Makes a staged file a blob. Raises the errors of StagedFile."""
        self.check_folder()
        staged.finish(self.folder)

    def mark_repaired(self, digest: str) -> None:
        """Records that a blob has been written again."""
        self._damaged.discard(digest)

    def open(self, checkpoint: str, file: StoredFile) -> Blob:
        """Opens a blob of a checkpoint.

        Raises:
            DataLoss: The blob is missing, or has another size.
            StoreFailed: The store's folder was replaced.
        """
        self.check_folder()

        def damaged() -> None:
            log.error("%s is damaged: blob %s", checkpoint, file.blake3)
            self._damaged.add(file.blake3)

        return open_blob(self.folder / file.blake3, file.size, checkpoint, file.filename, damaged)


def _remove(remove: Callable[[], None]) -> None:
    with suppress(RequestError), disk_errors():  # disk_errors logs it
        remove()
