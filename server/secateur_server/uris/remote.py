"""What fsspec opens: s3:// and the like.

Read in ranges to a file without a name on the store's disk, which is then mapped; written as a
multipart upload, which leaves nothing where it does not end.
"""

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from secateur_server.devices.mapping import map_file
from secateur_server.devices.watch import watch
from secateur_server.durable import full_disk
from secateur_server.errors import Stopped, UriChanged, UriFailed, UriNotFound, quote

_INSTALL = "pip install 'secateur[remote]'"

Bytes = bytes | memoryview
Found = TypeVar("Found")

# What one request asks for, and how many are on their way: 32 MiB hide 50 ms at 600 MB/s.
RANGE_BYTES = 8 << 20
AT_ONCE = 4

# S3 takes up to 10,000 parts of a multipart upload.
MOST_PARTS = 9_000


class RemoteFile:
    """A file that is open to be read."""

    def __init__(self, field: str, uri: str, scratch: Path) -> None:
        """Errors: UriNotFound, UriFailed, UriChanged, StoreFull."""
        self._field, self._uri = field, uri
        self._system, self._path = _system(field, uri)
        self._before = self._info()
        with tempfile.TemporaryFile(dir=scratch) as file:
            size = int(self._before["size"])
            watch().begin("fetch", size)
            with full_disk():
                for part in self._ranges(size):
                    file.write(part)
                    watch().advance(len(part))
                file.flush()
            self.data, _ = map_file(file.fileno())
        self.check_unchanged()

    def _info(self) -> dict[str, Any]:
        try:
            self._system.invalidate_cache()
            found: dict[str, Any] = _result(_start(self._system.info, self._path))
        except FileNotFoundError:
            raise UriNotFound(self._field, f"there is no {quote(self._uri)}") from None
        except Stopped:
            raise
        except Exception as error:  # of a library for any kind of store
            raise _failed(self._field, self._uri, "read", error) from None
        if found.get("type") != "file":
            raise UriFailed(self._field, f"{quote(self._uri)} is no file")
        return found

    def _ranges(self, size: int) -> Iterator[bytes]:
        """The file, in ranges of which some are on their way."""
        coming: deque[Future[bytes]] = deque()
        for start in range(0, size, RANGE_BYTES):
            coming.append(_start(self._range, start, min(start + RANGE_BYTES, size)))
            if len(coming) == AT_ONCE:
                yield _result(coming.popleft())
        while coming:
            yield _result(coming.popleft())

    def _range(self, start: int, end: int) -> bytes:
        try:
            data: bytes = self._system.cat_file(self._path, start=start, end=end)
        except Exception as error:
            raise _failed(self._field, self._uri, "read", error) from None
        if len(data) != end - start:
            raise UriChanged(self._field, f"{quote(self._uri)} changed while it was read")
        return data

    def check_unchanged(self) -> None:
        """Errors: UriChanged, where it was written to since it was opened."""
        now = self._info()
        for key in ("size", "ETag", "LastModified", "mtime"):
            if now.get(key) != self._before.get(key):
                raise UriChanged(self._field, f"{quote(self._uri)} changed while it was read")

    def close(self) -> None:
        """Its memory stays until nobody uses it."""


class RemoteTarget:
    """A file that is there whole once `commit` returns, and leaves nothing before."""

    def __init__(self, field: str, uri: str, size: int) -> None:
        """size: of what is to be written.  Errors: UriFailed."""
        self._field, self._uri = field, uri
        self._system, self._path = _system(field, uri)
        part = max(RANGE_BYTES, -(-size // MOST_PARTS))
        try:
            self._file = self._system.open(self._path, "wb", block_size=part)
        except Exception as error:
            raise _failed(field, uri, "written", error) from None
        self._is_open = True

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes all of it.  Errors: UriFailed."""
        for part in parts:
            try:
                self._file.write(part)
            except Exception as error:
                raise _failed(self._field, self._uri, "written", error) from None

    def commit(self) -> None:
        """Puts it in its place.  Errors: UriFailed."""
        try:
            self._file.close()
        except Exception as error:
            raise _failed(self._field, self._uri, "written", error) from None
        self._is_open = False

    def discard(self) -> None:
        """Leaves nothing of what was not committed."""
        if self._is_open:
            with suppress(Exception):
                self._file.discard()
            self._file.closed = True  # else it would be written when it is collected


def missing(prefix: str) -> str:
    """What has to be installed before URIs of a prefix can be opened; empty where nothing has."""
    try:
        import fsspec

        fsspec.get_filesystem_class(prefix.partition("://")[0])
    except (ImportError, ValueError) as error:  # ValueError: fsspec does not know the scheme
        return f"{error}; on the server: {_INSTALL}"
    return ""


def _start(function: Callable[..., Found], *arguments: Any) -> Future[Found]:
    """Calls a function in a thread that is left where the caller leaves, or the server ends."""
    coming: Future[Found] = Future()

    def call() -> None:
        try:
            coming.set_result(function(*arguments))
        except BaseException as error:
            coming.set_exception(error)

    threading.Thread(target=call, name="remote", daemon=True).start()
    return coming


def _result(coming: Future[Found]) -> Found:
    """What comes, unless the caller leaves before.  Errors: Stopped."""
    while not wait([coming], timeout=0.2).done:
        watch().check()
    return coming.result()


def _system(field: str, uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.  Errors: UriFailed."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:  # of fsspec, or of what it opens this kind of URI with
        needed = ValueError(f"{error}; on the server: {_INSTALL}")
        raise _failed(field, uri, "opened", needed) from None
    except Exception as error:
        raise _failed(field, uri, "opened", error) from None
    return system, path


def _failed(field: str, uri: str, what: str, error: Exception) -> UriFailed:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UriFailed(field, f"{quote(uri)} cannot be {what}: {reason}")
