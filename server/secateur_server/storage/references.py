"""Reference counts of files by digest."""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from secateur_server.storage.blobs import disk_bytes
from secateur_server.storage.records import StoredFile


class References:
    """Reference counts of files by digest. The store's lock guards them.

    Attributes:
        bytes: Bytes that the files take on disk, each counted once.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._counts = Counter[str]()
        self._sizes: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def has(self, digest: str, size: int) -> bool:
        """Whether a file of this digest and size has a reference."""
        return self._sizes.get(digest) == size

    def count(self, digest: str) -> int:
        """The number of references to a file."""
        return self._counts[digest]

    def acquire(self, files: Iterable[StoredFile]) -> None:
        """Adds a reference to each file."""
        for file in files:
            self._counts[file.blake3] += 1
            if file.blake3 not in self._sizes:
                self._sizes[file.blake3] = file.size
                self.bytes += disk_bytes(file.size)

    def release(self, files: Iterable[StoredFile]) -> list[StoredFile]:
        """Removes a reference from each file. Returns the files that have no reference left."""
        unused = []
        for file in files:
            self._counts[file.blake3] -= 1
            if not self._counts[file.blake3]:
                del self._counts[file.blake3]
                self.bytes -= disk_bytes(self._sizes.pop(file.blake3))
                unused.append(file)
        return unused


class Holder(Protocol):
    """A holder of references: a checkpoint or an upload."""

    @property
    def own_bytes(self) -> int:
        """Bytes that it takes on disk beside its files."""

    def files(self) -> list[StoredFile]:
        """The files that it refers to; one may occur twice."""


class PlannedRelease:
    """The effect of releasing references, computed without releasing them.

    Attributes:
        freed: Bytes on disk that the release of all added holders frees.
    """

    def __init__(self, references: References) -> None:
        self.freed = 0
        self._references = references
        self._released = Counter[str]()

    def frees(self, holder: Holder) -> int:
        """Bytes that the release of one more holder frees."""
        files = {file.blake3: file.size for file in holder.files()}
        counts = Counter(file.blake3 for file in holder.files())
        return holder.own_bytes + sum(
            disk_bytes(files[digest])
            for digest, count in counts.items()
            if self._released[digest] + count == self._references.count(digest)
        )

    def add(self, holder: Holder) -> None:
        """Adds a holder to the release."""
        self.freed += self.frees(holder)
        self._released.update(file.blake3 for file in holder.files())
