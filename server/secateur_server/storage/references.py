"""Reference counts of files by digest."""

from collections import Counter
from collections.abc import Iterable

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
