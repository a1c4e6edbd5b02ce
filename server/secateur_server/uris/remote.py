"""URIs that fsspec opens: s3://, http:// and others.

A file is fetched in ranges to an unnamed file on the store's disk, which is then mapped. It is
written as a multipart upload, which leaves nothing behind unless it is completed.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import IO, Any

from secateur_server.backends.mapping import map_file
from secateur_server.errors import (
    UriFailed,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import full_disk
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.systems import (
    RANGE_BYTES,
    Prefixes,
    changed,
    failed,
    not_found,
    open_system,
)

Bytes = bytes | memoryview

# Requests for ranges at once: 32 MiB hide a latency of 50 ms at 600 MB/s.
CONCURRENT_RANGES = 4

# S3 allows 10,000 parts in a multipart upload.
MAX_PARTS = 9_000


def part_bytes(size: int) -> int:
    """The bytes of each part of an upload, so that a file of `size` has at most MAX_PARTS."""
    return max(RANGE_BYTES, -(-size // MAX_PARTS))


class RemoteFile:
    """A remote file, which can be read once it is fetched.

    Args:
        context: The request.
        field: Of the request, for errors.
        uri: Of the file.
        requests: Makes the requests.
        prefixes: Prefixes of allowed URIs.

    Attributes:
        uri: As given.
        size: Bytes.
        data: The fetched file in mapped memory.

    Raises:
        UriNotFound: It does not exist.
        UriFailed: It cannot be read.
        UriNotAllowed: It redirects to a URL that no prefix allows.
        QueueFull: Too many requests wait.
        Cancelled: The request has been cancelled.
    """

    data: memoryview

    def __init__(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        requests: Requests,
        prefixes: Prefixes,
    ) -> None:
        self._context, self._requests = context, requests
        self._field, self.uri = field, uri
        self._system, self._path = open_system(context, field, uri, requests, prefixes)
        self._before = self._info()
        self.size = int(self._before["size"])

    def fetch(self, scratch: Scratch) -> None:
        """Fetches the file to the disk.

        Args:
            scratch: Where to.

        Raises:
            UriNotFound, UriFailed: It cannot be read any more.
            UriChanged: It changed while it was read.
            StoreFull: The disk is full.
        """
        with tempfile.TemporaryFile(dir=scratch.folder) as file:
            self.save(file, scratch.count)
            self.data, _ = map_file(file.fileno())
        self.check_unchanged()

    def save(self, file: IO[bytes], count: Callable[[int], None]) -> None:
        """Fetches the file to an open one.

        Args:
            file: Written to.
            count: Called with the number of bytes of each part.

        Raises:
            UriNotFound, UriFailed, UriChanged, StoreFull: As of fetch.
        """
        self._context.begin("fetch", self.size)
        with full_disk():
            for part in self.parts():
                file.write(part)
                count(len(part))
                self._context.advance(len(part))
            file.flush()

    @property
    def version(self) -> tuple[tuple[str, str], ...]:
        """What the store says of the file that was opened, and that differs once it changes."""
        return _version(self._before)

    def _info(self) -> dict[str, Any]:
        try:
            self._system.invalidate_cache()
            request = self._requests.start(self._context, self._system, "info", self._path)
            found: dict[str, Any] = self._requests.result(self._context, request)
        except FileNotFoundError as error:
            raise not_found(self._field, self.uri, error) from None
        except Exception as error:  # fsspec's libraries raise errors of many kinds
            raise failed(self._field, self.uri, "read", error) from None
        if found.get("type") != "file":
            raise UriFailed(self._field, f"{quote(self.uri)} is not a file")
        if found.get("size") is None:
            unknown = ValueError("the remote does not send its size (over HTTP: no Content-Length)")
            raise failed(self._field, self.uri, "read", unknown)
        return found

    def parts(self) -> Iterator[bytes]:
        """Yields the file in ranges, of which CONCURRENT_RANGES are requested at once.

        Raises:
            UriFailed, UriChanged: It cannot be read, or has another size than before.
        """
        pending: deque[tuple[int, Future[bytes]]] = deque()
        try:
            for start in range(0, self.size, RANGE_BYTES):
                end = min(start + RANGE_BYTES, self.size)
                start_request = partial(
                    self._requests.start, self._context, self._system, "cat_file", self._path
                )
                pending.append((end - start, start_request(start=start, end=end)))
                if len(pending) == CONCURRENT_RANGES:
                    yield self._range(*pending.popleft())
            while pending:
                yield self._range(*pending.popleft())
        finally:
            for _, request in pending:
                request.cancel()

    def _range(self, length: int, request: Future[bytes]) -> bytes:
        try:
            data = self._requests.result(self._context, request)
        except Exception as error:
            raise failed(self._field, self.uri, "read", error) from None
        if len(data) != length:
            raise changed(self._field, self.uri)
        return data

    def check_unchanged(self) -> None:
        """Checks that nobody has written to the file since it was opened.

        Raises:
            UriChanged: Its size, time or ETag differs.
        """
        if _version(self._info()) != self.version:
            raise changed(self._field, self.uri)


def _version(info: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    keys = ("size", "ETag", "LastModified", "Last-Modified", "mtime")
    return tuple((key, str(info[key])) for key in keys if info.get(key) is not None)


class RemoteTarget:
    """A remote file to write, which `commit` puts in place as a whole.

    Each step runs in a thread of its own, which is abandoned if the store hangs.

    Args:
        context: The request.
        field: Of the request, for errors.
        uri: Of the file.
        size: Bytes that will be written.
        requests: Makes the requests.
        prefixes: Prefixes of allowed URIs.

    Raises:
        UriFailed: It cannot be written.
        QueueFull: Too many requests wait.
        Cancelled: The request has been cancelled.
    """

    def __init__(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        size: int,
        requests: Requests,
        prefixes: Prefixes,
    ) -> None:
        self._context, self._requests = context, requests
        self._field, self._uri = field, uri
        self._system, self._path = open_system(context, field, uri, requests, prefixes)
        self._part = part_bytes(size)
        self._file: Any = None
        self._is_open = True
        self._last: Future[None] | None = None
        try:
            self._run(self._open)
        except BaseException:
            self.discard()
            raise

    def _open(self) -> None:
        self._file = self._system.open(self._path, "wb", block_size=self._part)

    def _run(self, step: Callable[[], Any], is_cancellable: bool = True) -> None:
        try:
            self._last = self._requests.in_thread(self._context, step, is_cancellable)
            self._requests.result(self._context, self._last, is_cancellable)
        except Exception as error:
            raise failed(self._field, self._uri, "written", error) from None

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes the whole file.

        Raises:
            UriFailed: The store failed.
            QueueFull: Too many requests wait.
            Cancelled: The request has been cancelled.
        """
        for part in parts:
            self._run(partial(self._file.write, part))

    def commit(self) -> None:
        """Puts the file in place, even after cancellation, since other files may be in place.

        Raises:
            UriFailed: The store failed.
            QueueFull: Too many requests wait.
        """
        self._run(self._file.close, is_cancellable=False)
        self._is_open = False

    def discard(self) -> None:
        """Aborts the upload if it was not committed."""
        if not self._is_open:
            return
        if self._last is None or self._last.done():
            self._requests.finish(self._abandon)
        else:  # the last step still blocks its thread, which then runs this
            self._last.add_done_callback(lambda _: self._abandon())

    def _abandon(self) -> None:
        if self._file is None:
            return
        with suppress(Exception):
            self._file.discard()
        self._file.closed = True  # or the garbage collector would complete the upload
