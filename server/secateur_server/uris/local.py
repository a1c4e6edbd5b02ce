"""file:// URIs under folders of --allow-path.

A file is checked after it is opened, by the path that the kernel reports. So a symbolic link to a
place outside is refused, even if somebody creates it between a check and the opening.
"""

import os
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from secateur_server.backends.mapping import map_file
from secateur_server.errors import UriFailed, UriNotAllowed, UriNotFound, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import DurableFile
from secateur_server.uris.multipart import Uploaded
from secateur_server.uris.systems import changed
from secateur_server.wire.writer import OutgoingFile, track_progress

Bytes = bytes | memoryview


# File systems store times in steps of a few milliseconds.
TIMESTAMP_STEP_NS = 20_000_000


class LocalFile:
    """A local file that is open for reading.

    Args:
        field: Of the request, for errors.
        uri: Of the file.
        roots: Folders under which it must be.

    Attributes:
        uri: As given.
        data: The file in mapped memory.
        size: Bytes.

    Raises:
        UriNotAllowed: It is outside the roots.
        UriNotFound: It does not exist.
        UriFailed: It cannot be opened, or is not a regular file.
    """

    def __init__(self, field: str, uri: str, roots: Sequence[Path]) -> None:
        self._field, self.uri = field, uri
        path = _path(field, uri, roots)
        # O_NONBLOCK, since opening a pipe waits for a writer.
        self._fd = _open(field, uri, path, roots, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check_inside(field, uri, self._fd, roots)
            self.opened = os.fstat(self._fd)
            if not stat.S_ISREG(self.opened.st_mode):
                raise UriFailed(field, f"{quote(uri)} is not a file")
            _wait_until_writes_show(self.opened.st_mtime_ns)
            self.data, self._guard = map_file(self._fd)
            self.size = len(self.data)
        except BaseException:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """Checks that nobody has written to the file since it was opened.

        Raises:
            UriChanged: Somebody has, or has truncated it.
        """
        now, before = os.fstat(self._fd), self.opened
        is_same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not is_same or (self._guard and self._guard.is_truncated):
            raise changed(self._field, self.uri)

    @property
    def real_path(self) -> str:
        """The path that the kernel reports: without links."""
        return os.readlink(f"/proc/self/fd/{self._fd}")

    def close(self) -> None:
        """Closes the file. Its mapped memory is valid as long as anything refers to it."""
        os.close(self._fd)


class LocalTarget:
    """A local file to write, which `commit` puts in place as a whole.

    Args:
        field: Of the request, for errors.
        uri: Of the file.
        roots: Folders under which it must be.

    Raises:
        UriNotAllowed: It is outside the roots.
        UriNotFound: Its folder does not exist.
        UriFailed: It cannot be written, or is a folder.
    """

    def __init__(self, field: str, uri: str, roots: Sequence[Path]) -> None:
        self._field, self._uri = field, uri
        path = _path(field, uri, roots)
        self._name = path.name
        self._unfinished = f".{secrets.token_hex(8)}.unfinished"
        self._folder = _open(field, uri, path.parent, roots, os.O_RDONLY | os.O_DIRECTORY)
        self._fd: int | None = None
        try:
            _check_inside(field, uri, self._folder, roots)
            self._check_place()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._fd = os.open(self._unfinished, flags, 0o666, dir_fd=self._folder)
        except OSError as error:
            self.discard()
            raise UriFailed(field, f"{quote(uri)} cannot be written: {error.strerror}") from None
        except BaseException:
            self.discard()
            raise

    def _check_place(self) -> None:
        """Refuses a folder early, which no file can replace."""
        with suppress(FileNotFoundError):
            found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise UriFailed(self._field, f"{quote(self._uri)} is a folder")

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes the whole file, and syncs it.

        Raises:
            UriFailed: The disk failed, or is full.
        """
        assert self._fd is not None, "the file is open"
        _write(self._field, self._uri, self._fd, parts)

    def place(self) -> "LocalPlace":
        """Where another process, on any node that has the file system, writes the whole file."""
        folder = os.readlink(f"/proc/self/fd/{self._folder}")
        return LocalPlace(self._field, self._uri, f"{folder}/{self._unfinished}")

    def received(self, uploaded: Uploaded) -> None:
        """Notes what the other process has written: it is in the file already."""

    def commit(self) -> None:
        """Puts the file in place.

        Raises:
            UriFailed: The disk failed.
        """
        try:
            folder = self._folder
            os.replace(self._unfinished, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        except OSError as error:
            raise _failed(self._field, self._uri, error) from None

    def discard(self) -> None:
        """Closes the file, and removes it if it was not committed."""
        if self._fd is not None:
            os.close(self._fd)
        with suppress(OSError):
            os.unlink(self._unfinished, dir_fd=self._folder)
        os.close(self._folder)


@dataclass(frozen=True)
class LocalPlace:
    """An unfinished file of a LocalTarget. It can be pickled.

    Attributes:
        field: Of the request, for errors.
        uri: Of the finished file.
        path: Of the unfinished file.
    """

    field: str
    uri: str
    path: str

    def write(self, context: RequestContext, file: OutgoingFile) -> Uploaded:
        """Writes the whole file, and syncs it. A repetition writes the same bytes again.

        Returns:
            Nothing that LocalTarget.received needs.

        Raises:
            UriFailed: The disk failed or is full, or the call has ended.
        """
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise _failed(self.field, self.uri, error) from None
        try:
            _write(self.field, self.uri, descriptor, track_progress(context, file.parts()))
        finally:
            os.close(descriptor)
        return ()


def _write(field: str, uri: str, descriptor: int, parts: Iterable[Bytes]) -> None:
    """Writes and syncs a file. Raises UriFailed."""
    disk = DurableFile(descriptor)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[disk.write(view) :]
        disk.sync()
    except OSError as error:
        raise _failed(field, uri, error) from None


def _failed(field: str, uri: str, error: OSError) -> UriFailed:
    return UriFailed(field, f"{quote(uri)} cannot be written: {error.strerror or error}")


def _wait_until_writes_show(mtime_ns: int) -> None:
    """Waits until a further write would change the modification time of a file."""
    age = time.time_ns() - mtime_ns
    if 0 <= age < TIMESTAMP_STEP_NS:
        time.sleep((TIMESTAMP_STEP_NS - age) / 1e9)


def _path(field: str, uri: str, roots: Sequence[Path]) -> Path:
    host, slash, rest = uri.removeprefix("file://").partition("/")
    path = Path(unquote(slash + rest))
    is_local = host in ("", "localhost") and path.is_absolute() and "\0" not in str(path)
    # A file name has no slash, so %2F is refused. file:// URIs have no query and no fragment.
    if not is_local or ".." in path.parts or {"?", "#"} & set(rest) or "%2f" in rest.lower():
        raise UriNotAllowed(field, f"{quote(uri)} is not file:// with an absolute path")
    if not any(path.is_relative_to(r) or path.is_relative_to(r.resolve()) for r in roots):
        raise _outside(field, uri)
    return path


def _open(field: str, uri: str, path: Path, roots: Sequence[Path], flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        # The error must not tell whether a path outside the roots exists.
        if not _is_inside(Path(os.path.realpath(path)), roots):
            raise _outside(field, uri) from None
        if isinstance(error, FileNotFoundError):
            raise UriNotFound(field, f"{quote(uri)} does not exist") from None
        raise UriFailed(field, f"{quote(uri)} cannot be opened: {error.strerror}") from None


def _check_inside(field: str, uri: str, fd: int, roots: Sequence[Path]) -> None:
    if not _is_inside(Path(os.readlink(f"/proc/self/fd/{fd}")), roots):
        raise _outside(field, uri)


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root.resolve()) for root in roots)


def _outside(field: str, uri: str) -> UriNotAllowed:
    return UriNotAllowed(field, f"{quote(uri)} is not under a folder of the server's --allow-path")
