"""The objects of a store, through fsspec."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from secateur_server.errors import (
    QueueFull,
    RequestError,
    StoreFailed,
    UriChanged,
    UriFailed,
    UriNotFound,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.uris.remote import RemoteFile, RemoteTarget
from secateur_server.uris.requests import Requests
from secateur_server.wire.writer import Bytes

_FIELD = "checkpoint"


class Found(NamedTuple):
    """An object: its bytes, and when it was written, in seconds since 1970."""

    size: int
    time: float


class Objects:
    """Objects under a prefix. Keys are relative to it.

    Args:
        uri: The prefix.
        timeout: Seconds that the store has for each request.

    Raises:
        ImportError, ValueError: A package for this kind of store is missing.
    """

    def __init__(self, uri: str, timeout: float) -> None:
        import fsspec

        self.uri = uri.rstrip("/")
        self._requests = Requests(timeout)
        self._system: Any
        # Listings must be those of the store, whatever other servers do.
        self._system, root = fsspec.core.url_to_fs(
            self.uri, use_listings_cache=False, skip_instance_cache=True
        )
        self._root = root.rstrip("/")

    def _call(
        self, context: RequestContext, name: str, key: str, *arguments: Any, **options: Any
    ) -> Any:
        """Makes a request. Raises FileNotFoundError or a RequestError."""
        with _store_errors():
            path = f"{self._root}/{key}"
            request = self._requests.start(context, self._system, name, path, *arguments, **options)
            return self._requests.result(context, request)

    def read(self, context: RequestContext, key: str) -> bytes | None:
        """Reads a small object; None: it does not exist."""
        try:
            data: bytes = self._call(context, "cat_file", key)
        except FileNotFoundError:
            return None
        return data

    def write(self, context: RequestContext, key: str, data: bytes = b"") -> None:
        """Writes a small object, or replaces it."""
        try:
            self._call(context, "pipe_file", key, data)
        except FileNotFoundError as error:  # there is no such bucket
            raise StoreFailed(_FIELD, f"the object store failed: {error}") from None

    def remove(self, context: RequestContext, key: str) -> None:
        """Removes an object, if it exists."""
        try:
            self._call(context, "rm_file", key)
        except FileNotFoundError:
            return

    def find(self, context: RequestContext, key: str) -> Found | None:
        """Finds an object; None: it does not exist."""
        try:
            return _found(self._call(context, "info", key))
        except FileNotFoundError:
            return None

    def list(self, context: RequestContext, prefix: str) -> dict[str, Found]:
        """Lists the objects whose keys begin with a prefix and a slash."""
        try:
            listed = self._call(context, "find", prefix, detail=True)
        except FileNotFoundError:
            return {}
        begin = len(self._root) + 1
        return {
            path[begin:]: _found(info) for path, info in listed.items() if info["type"] == "file"
        }

    def upload(self, context: RequestContext, key: str, size: int, parts: Iterable[Bytes]) -> None:
        """Writes an object, all of it or nothing."""
        uri = f"{self.uri}/{key}"
        with _store_errors():
            target = RemoteTarget(context, _FIELD, uri, size, self._requests, (self.uri,))
            try:
                target.write(parts)
                target.commit()
            finally:
                target.discard()

    def download(self, context: RequestContext, key: str) -> Iterator[bytes]:
        """Yields the parts of an object.

        Raises:
            FileNotFoundError: It does not exist.
        """
        uri = f"{self.uri}/{key}"
        with _store_errors():
            try:
                yield from RemoteFile(context, _FIELD, uri, self._requests, (self.uri,)).parts()
            except UriNotFound:
                raise FileNotFoundError(key) from None


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turns errors of a store into StoreFailed. The caller's libraries raise many kinds."""
    try:
        yield
    except (FileNotFoundError, GeneratorExit):
        raise
    except (UriFailed, UriChanged, QueueFull) as error:
        raise StoreFailed(_FIELD, f"the object store failed: {error.description}") from None
    except RequestError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreFailed(_FIELD, f"the object store failed: {reason}") from None


def _found(info: dict[str, Any]) -> Found:
    time = info.get("LastModified") or info.get("mtime") or info.get("created")
    seconds = time if isinstance(time, float) else time.timestamp()  # type: ignore[union-attr]
    return Found(int(info["size"] or 0), seconds)
