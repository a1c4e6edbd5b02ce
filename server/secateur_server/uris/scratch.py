"""The disk for fetched files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur_server.errors import QueueFull, StoreFull, quote
from secateur_server.runtime.budget import Budget, Full, half_of
from secateur_server.runtime.context import RequestContext

RETRY_SECONDS = 1.0


class Scratch:
    """A folder for fetched files, which calls hold until they end.

    A named tenant has at most half of it, so that its fetches keep nobody out.

    Args:
        folder: On the store's disk.
        limit: Bytes of all fetched files at once.
        count: Is called with the bytes that are fetched.
    """

    def __init__(self, folder: Path, limit: int, count: Callable[[int], None]) -> None:
        self.folder, self.count = folder, count
        self._budget = Budget(limit, 0, half_of(limit))

    @property
    def held(self) -> int:
        """Bytes of files that are here, or on their way."""
        return self._budget.held

    @contextmanager
    def reserved(self, context: RequestContext, field: str, uri: str, size: int) -> Iterator[None]:
        """Reserves `size` bytes of disk for the block, in which they are fetched and used.

        Raises:
            StoreFull: They would never fit.
            QueueFull: They do not fit beside those of other calls.
        """
        most = self._budget.most(context.tenant)
        if size > most:
            raise StoreFull(
                field,
                f"{quote(uri)} takes {size} bytes of disk; this server fetches up to {most} for "
                "one tenant (--store-max-bytes)",
            )
        try:
            self._budget.acquire(context, size)
        except Full as full:
            raise QueueFull(
                field,
                f"{quote(uri)} takes {size} bytes of disk, and fetched files of other calls have "
                f"{full.held} of {self._budget.limit} (--store-max-bytes), {full.mine.amount} of "
                f"the {most} for this tenant",
                RETRY_SECONDS,
            ) from None
        try:
            yield
        finally:
            self._budget.release(context.tenant, size)
