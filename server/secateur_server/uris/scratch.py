"""Disk space for fetched files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur_server.errors import QueueFull, StoreFull, quote
from secateur_server.runtime.budget import Budget, Full, half_of
from secateur_server.runtime.context import RequestContext

RETRY_SECONDS = 1.0


class Scratch:
    """A folder for fetched files, which exist until their calls end.

    A named tenant may use at most half of it, so that it cannot block other tenants.

    Args:
        folder: On the store's disk.
        limit: Bytes of all fetched files at once.
        count: Called with the number of bytes that have been fetched.
    """

    def __init__(self, folder: Path, limit: int, count: Callable[[int], None]) -> None:
        self.folder, self.count = folder, count
        self._budget = Budget(limit, 0, half_of(limit))

    @property
    def held(self) -> int:
        """Bytes of fetched files, and of files that are being fetched."""
        return self._budget.held

    @contextmanager
    def reserved(self, context: RequestContext, field: str, uri: str, size: int) -> Iterator[None]:
        """Reserves disk space for the block, in which files are fetched and used.

        Args:
            context: The request.
            field: Of the request, for errors.
            uri: Of the files, for errors.
            size: Bytes on disk.

        Raises:
            StoreFull: They would never fit.
            QueueFull: They do not fit beside fetched files of other calls.
        """
        most = self._budget.limit_for(context.tenant)
        if size > most:
            raise StoreFull(
                field,
                f"{quote(uri)} needs {size} bytes of disk; this server fetches up to {most} for "
                "one tenant (--store-max-bytes)",
            )
        try:
            self._budget.acquire(context, size)
        except Full as full:
            raise QueueFull(
                field,
                f"{quote(uri)} needs {size} bytes of disk, and fetched files of other calls use "
                f"{full.held} of {self._budget.limit} (--store-max-bytes), {full.mine.amount} of "
                f"the {most} for this tenant; retry later",
                RETRY_SECONDS,
            ) from None
        try:
            yield
        finally:
            self._budget.release(context.tenant, size)
