"""What fsspec opens: s3:// and the like.

Read in ranges to a file without a name on the store's disk, which is then mapped; written as a
multipart upload, which leaves nothing where it does not end.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from secateur_server.backends.mapping import map_file
from secateur_server.errors import (
    RequestError,
    UriChanged,
    UriFailed,
    UriNotAllowed,
    UriNotFound,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import full_disk
from secateur_server.uris.redirects import HTTP, NotListed, options
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch

_INSTALL = "pip install 'secateur[remote]'"
_OF_EXTRA = ("fsspec", "s3fs")

Bytes = bytes | memoryview
Prefixes = Sequence[str]

# What one request asks for, and how many are on their way: 32 MiB hide 50 ms at 600 MB/s.
RANGE_BYTES = 8 << 20
AT_ONCE = 4

# S3 takes up to 10,000 parts of a multipart upload.
MAX_PARTS = 9_000


class RemoteFile:
    """A file that can be read once it is fetched.  size: in bytes."""

    data: memoryview

    def __init__(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        requests: Requests,
        prefixes: Prefixes,
    ) -> None:
        """prefixes: that are allowed.  Errors: UriNotFound, UriFailed, UriNotAllowed, QueueFull."""
        self._context, self._requests = context, requests
        self._field, self.uri = field, uri
        self._system, self._path = _system(context, field, uri, requests, prefixes)
        self._before = self._info()
        self.size = int(self._before["size"])

    def fetch(self, scratch: Scratch) -> None:
        """Reads it to the disk.  Errors: UriNotFound, UriFailed, UriChanged, StoreFull."""
        with tempfile.TemporaryFile(dir=scratch.folder) as file:
            self._context.begin("fetch", self.size)
            with full_disk():
                for part in self._ranges(self.size):
                    file.write(part)
                    scratch.count(len(part))
                    self._context.advance(len(part))
                file.flush()
            self.data, _ = map_file(file.fileno())
        self.check_unchanged()

    def _info(self) -> dict[str, Any]:
        try:
            self._system.invalidate_cache()
            asked = self._requests.start(self._context, self._system, "info", self._path)
            found: dict[str, Any] = self._requests.result(self._context, asked)
        except FileNotFoundError as error:
            raise _not_found(self._field, self.uri, error) from None
        except Exception as error:  # of a library for any kind of store
            raise _failed(self._field, self.uri, "read", error) from None
        if found.get("type") != "file":
            raise UriFailed(self._field, f"{quote(self.uri)} is no file")
        if found.get("size") is None:
            unknown = ValueError("the remote does not tell its size (over HTTP: no Content-Length)")
            raise _failed(self._field, self.uri, "read", unknown)
        return found

    def _ranges(self, size: int) -> Iterator[bytes]:
        """The file, in ranges of which some are on their way."""
        coming: deque[tuple[int, Future[bytes]]] = deque()
        try:
            for start in range(0, size, RANGE_BYTES):
                end = min(start + RANGE_BYTES, size)
                asked = partial(
                    self._requests.start, self._context, self._system, "cat_file", self._path
                )
                coming.append((end - start, asked(start=start, end=end)))
                if len(coming) == AT_ONCE:
                    yield self._range(*coming.popleft())
            while coming:
                yield self._range(*coming.popleft())
        finally:
            for _, request in coming:
                request.cancel()

    def _range(self, length: int, coming: Future[bytes]) -> bytes:
        try:
            data = self._requests.result(self._context, coming)
        except Exception as error:
            raise _failed(self._field, self.uri, "read", error) from None
        if len(data) != length:
            raise UriChanged(self._field, f"{quote(self.uri)} changed while it was read")
        return data

    def check_unchanged(self) -> None:
        """Errors: UriChanged, where it was written to since it was opened."""
        now = self._info()
        for key in ("size", "ETag", "LastModified", "Last-Modified", "mtime"):
            if now.get(key) != self._before.get(key):
                raise UriChanged(self._field, f"{quote(self.uri)} changed while it was read")

    def close(self) -> None:
        """Its memory stays until nobody uses it."""


class RemoteTarget:
    """A file that is there whole once `commit` returns, and leaves nothing before.

    Each step runs in a thread of its own, which is left when the store hangs.
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
        """size: of what is to be written.  prefixes: that are allowed.

        Errors: UriFailed, QueueFull.
        """
        self._context, self._requests = context, requests
        self._field, self._uri = field, uri
        self._system, self._path = _system(context, field, uri, requests, prefixes)
        self._part = max(RANGE_BYTES, -(-size // MAX_PARTS))
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

    def _run(self, step: Callable[[], Any], can_leave: bool = True) -> None:
        """Errors: UriFailed, QueueFull, Cancelled."""
        try:
            self._last = self._requests.in_thread(self._context, step, can_leave)
            self._requests.result(self._context, self._last, can_leave)
        except Exception as error:
            raise _failed(self._field, self._uri, "written", error) from None

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes all of it.  Errors: UriFailed, QueueFull, Cancelled."""
        for part in parts:
            self._run(partial(self._file.write, part))

    def commit(self) -> None:
        """Puts it in its place, also where the caller leaves now: other files may be in theirs.

        Errors: UriFailed, QueueFull.
        """
        self._run(self._file.close, can_leave=False)
        self._is_open = False

    def discard(self) -> None:
        """Leaves nothing of what was not committed."""
        if not self._is_open:
            return
        if self._last is None or self._last.done():
            self._requests.finish(self._abandon)
        else:  # the store hangs in the last step: its thread goes on with this
            self._last.add_done_callback(lambda _: self._abandon())

    def _abandon(self) -> None:
        if self._file is None:
            return
        with suppress(Exception):
            self._file.discard()
        self._file.closed = True  # else it would be written when it is collected


def missing(prefix: str) -> str:
    """What has to be installed before URIs of a prefix can be opened; empty where nothing has."""
    try:
        import fsspec

        fsspec.get_filesystem_class(prefix.partition("://")[0])
    except (ImportError, ValueError) as error:  # ValueError: fsspec does not know the scheme
        return f"{error}; on the server: {_installer(prefix)}"
    return ""


def _installer(uri: str) -> str:
    """The command that installs what opens a URI."""
    try:
        from fsspec.registry import known_implementations
    except ImportError:
        return _INSTALL
    known = known_implementations.get(uri.partition("://")[0], {})
    package = known.get("class", "fsspec").partition(".")[0]
    return _INSTALL if package in _OF_EXTRA else f"pip install {package}"


def _system(
    context: RequestContext, field: str, uri: str, requests: Requests, prefixes: Prefixes
) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.  Errors: UriFailed, QueueFull, Cancelled."""
    try:
        return _open_system(context, uri, requests, prefixes)
    except ImportError as error:  # of fsspec, or of what it opens this kind of URI with
        needed = ValueError(f"{error}; on the server: {_installer(uri)}")
        raise _failed(field, uri, "opened", needed) from None
    except Exception as error:
        raise _failed(field, uri, "opened", error) from None


def _open_system(
    context: RequestContext, uri: str, requests: Requests, prefixes: Prefixes
) -> tuple[Any, str]:
    import fsspec

    opened: tuple[Any, str]
    scheme = uri.partition("://")[0]
    kind = fsspec.get_filesystem_class(scheme)
    if scheme in HTTP:
        opened = fsspec.core.url_to_fs(uri, **options(kind, tuple(prefixes), RANGE_BYTES))
    elif kind.async_impl:
        opened = fsspec.core.url_to_fs(uri)
    else:  # it may connect at once; in its cache there would be one for each thread
        connect = partial(fsspec.core.url_to_fs, uri, skip_instance_cache=True)
        opened = requests.result(context, requests.in_thread(context, connect))
    return opened


def _not_found(field: str, uri: str, error: FileNotFoundError) -> RequestError:
    """Of HTTP, fsspec says that nothing is there whatever has gone wrong."""
    cause = error.__cause__
    is_hidden = isinstance(cause, OSError | NotListed | ValueError)
    if isinstance(cause, Exception) and (is_hidden or getattr(cause, "status", 404) != 404):
        return _failed(field, uri, "read", cause)
    return UriNotFound(field, f"there is no {quote(uri)}")


def _failed(field: str, uri: str, what: str, error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotListed):
        target = quote(error.target)
        return UriNotAllowed(
            field,
            f"{quote(uri)} redirects to {target}, which begins with no --allow-uri of the server",
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return UriFailed(field, f"{quote(uri)} cannot be {what}: {reason}")
