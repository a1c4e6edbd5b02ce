"""The blobs of a store: each once, for as long as anything refers to it."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from threading import RLock

from secateur_server.store.blobs import Blob, has_blob, open_blob, remove_blob, sums_bytes
from secateur_server.store.records import StoredFile

log = logging.getLogger(__name__)


class Shelf:
    """A folder of blobs, with the number of what refers to each: checkpoints, uploads, calls."""

    def __init__(self, folder: Path, lock: RLock) -> None:
        self.folder = folder
        self._lock = lock
        self._references: Counter[str] = Counter()  # by digest
        self._sizes: dict[str, int] = {}
        self._size = 0
        self._damaged: set[str] = set()

    def size(self) -> int:
        """What all blobs take on disk."""
        return self._size

    def bytes_freed(self, references: Counter[str]) -> int:
        """What goes with so many references to each digest: a blob that nobody else has."""
        with self._lock:
            gone = (d for d, count in references.items() if count == self._references[d])
            return sum(_disk_bytes(self._sizes[d]) for d in gone)

    def unknown(self) -> list[Path]:
        """What is in the folder that nothing refers to."""
        known = {name for digest in self._sizes for name in (digest, f"{digest}.sums")}
        return [path for path in self.folder.iterdir() if path.name not in known]

    def refer(self, files: Iterable[StoredFile]) -> None:
        """Keeps blobs that are there, or are to come."""
        with self._lock:
            for file in files:
                self._references[file.blake3] += 1
                if file.blake3 not in self._sizes:
                    self._sizes[file.blake3] = file.size
                    self._size += _disk_bytes(file.size)

    def release(self, files: Iterable[StoredFile]) -> None:
        """Takes back what `refer` did; the last to do so removes the blob."""
        with self._lock:
            for file in files:
                self._references[file.blake3] -= 1
                if not self._references[file.blake3]:
                    del self._references[file.blake3]
                    self._size -= _disk_bytes(self._sizes.pop(file.blake3))
                    remove_blob(self.folder / file.blake3)

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is there, and nothing is known against it."""
        return digest not in self._damaged and has_blob(self.folder / digest, size)

    def renewed(self, digest: str) -> None:
        """A blob has been written anew."""
        self._damaged.discard(digest)

    def open(self, of: str, file: StoredFile) -> Blob:
        """Opens a blob.  of: what it belongs to, for errors.  Errors: DataLoss."""

        def damaged() -> None:
            log.error("%s is damaged: blob %s", of, file.blake3)
            self._damaged.add(file.blake3)

        return open_blob(self.folder / file.blake3, file.size, of, file.filename, damaged)


def _disk_bytes(size: int) -> int:
    """What a blob of `size` bytes takes, with its sums."""
    return size + sums_bytes(size)
