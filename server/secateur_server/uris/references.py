"""References to the files of a URI, by which another process opens them."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from secateur_server.backends.mapping import map_file
from secateur_server.errors import StoreFull, UriFailed, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import full_disk
from secateur_server.uris.remote import RemoteFile
from secateur_server.uris.requests import Requests
from secateur_server.uris.systems import changed
from secateur_server.wire.mapped import MappedFile

# Seconds after its last use that a fetched file is removed which `forget` did not reach.
FORGOTTEN_SECONDS = 3600


class Reference(Protocol):
    """A file as the server found it, and may open it. It can be pickled, hashed and compared."""

    @property
    def filename(self) -> str:
        """Without a folder."""

    @property
    def size(self) -> int:
        """Bytes."""

    def open(self, context: RequestContext) -> MappedFile:
        """Opens the same file in any process.

        Raises:
            UriChanged: It is not the same any more.
            UriFailed: It cannot be read there.
        """

    def exists(self) -> bool:
        """Returns whether the file, or what `open` has fetched of it, is still on this node."""

    def forget(self) -> None:
        """Removes what `open` has fetched to this node."""


@dataclass(frozen=True)
class LocalReference:
    """A file of a file system that all nodes have at the same path.

    Attributes:
        field: Of the request, for errors.
        uri: Of the file.
        filename: Without a folder.
        path: Its real path, after links.
        size: Bytes.
        mtime_ns: When it was written.
    """

    field: str
    uri: str
    filename: str
    path: str
    size: int
    mtime_ns: int

    def open(self, context: RequestContext) -> MappedFile:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UriFailed(
                self.field,
                f"{quote(self.uri)} cannot be opened on node {os.uname().nodename}: "
                f"{error.strerror}; all nodes need the same file system at the same path",
            ) from None
        try:
            data, guard = map_file(descriptor)
        finally:
            os.close(descriptor)

        def check_unchanged() -> None:
            now = os.stat(self.path)
            is_same = (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)
            if not is_same or (guard and guard.is_truncated):
                raise changed(self.field, self.uri)

        check_unchanged()
        return MappedFile(self.filename, data, check_unchanged=check_unchanged)

    def exists(self) -> bool:
        return os.path.exists(self.path)

    def forget(self) -> None:
        return


@dataclass(frozen=True)
class RemoteReference:
    """A file of a remote store. The first process of a node that opens it fetches it to the disk.

    Attributes:
        field: Of the request, for errors.
        uri: Of the file.
        filename: Without a folder.
        size: Bytes.
        version: As RemoteFile.version.
        prefixes: Prefixes of allowed URIs.
        timeout: Seconds that the store has for each request.
    """

    field: str
    uri: str
    filename: str
    size: int
    version: tuple[tuple[str, str], ...]
    prefixes: tuple[str, ...]
    timeout: float

    @property
    def _path(self) -> Path:
        return _folder() / blake3(repr((self.uri, self.version)).encode()).hexdigest()

    def open(self, context: RequestContext) -> MappedFile:
        with suppress(FileNotFoundError):
            return self._mapped()
        requests = Requests(self.timeout)
        file = RemoteFile(context, self.field, self.uri, requests, self.prefixes)
        if file.version != self.version:
            raise changed(self.field, self.uri)
        _remove_forgotten()
        with self._node_errors(), tempfile.NamedTemporaryFile(dir=_folder(), delete=False) as kept:
            try:
                self._reserve(kept.fileno())
                file.save(kept, lambda count: None)
                file.check_unchanged()
                os.replace(kept.name, self._path)
            except BaseException:
                os.unlink(kept.name)
                raise
        return self._mapped()

    def _mapped(self) -> MappedFile:
        with self._path.open("rb") as file:
            os.utime(self._path)
            data, _ = map_file(file.fileno())
        return MappedFile(self.filename, data)

    def _reserve(self, descriptor: int) -> None:
        """Takes the disk space now, so that a file that does not fit is not fetched."""
        if self.size:
            with full_disk():
                os.posix_fallocate(descriptor, 0, self.size)

    @contextmanager
    def _node_errors(self) -> Iterator[None]:
        try:
            yield
        except StoreFull:
            raise StoreFull(
                self.field,
                f"{quote(self.uri)} does not fit on the disk of node {os.uname().nodename}: "
                f"{self.size} bytes in {tempfile.gettempdir()}; free disk space there, or set its "
                "TMPDIR",
            ) from None

    def exists(self) -> bool:
        return self._path.exists()

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


def _folder() -> Path:
    """The folder of fetched files, which only this user can write to."""
    folder = Path(tempfile.gettempdir()) / f"secateur-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _remove_forgotten() -> None:
    for path in _folder().iterdir():
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                path.unlink()
