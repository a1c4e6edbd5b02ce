"""The disk for fetched files."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur_server.errors import QueueFull, StoreFull, quote

RETRY_SECONDS = 1.0


class Scratch:
    """A folder for fetched files, which calls hold until they end.

    Args:
        folder: On the store's disk.
        limit: Bytes of all fetched files at once.
        count: Is called with the bytes that are fetched.
    """

    def __init__(self, folder: Path, limit: int, count: Callable[[int], None]) -> None:
        self.folder, self._limit, self.count = folder, limit, count
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of files that are here, or on their way."""
        return self._held

    @contextmanager
    def reserved(self, field: str, uri: str, size: int) -> Iterator[None]:
        """Reserves `size` bytes for the block, in which they are fetched and used.

        Raises:
            StoreFull: They would never fit.
            QueueFull: They do not fit beside those of other calls.
        """
        if size > self._limit:
            raise StoreFull(
                field,
                f"{quote(uri)} has {size} bytes; this server fetches up to {self._limit} "
                "(--store-max-bytes)",
            )
        with self._lock:
            if (held := self._held) + size > self._limit:
                raise QueueFull(
                    field,
                    f"{quote(uri)} has {size} bytes, and files of other calls have {held} of the "
                    f"{self._limit} that may be fetched at once (--store-max-bytes)",
                    RETRY_SECONDS,
                )
            self._held += size
        try:
            yield
        finally:
            with self._lock:
                self._held -= size
