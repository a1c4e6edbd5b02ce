"""file:// URIs, under folders that the operator listed.

What counts is where an open file is, as the kernel says, not what its path looked like before: a
symbolic link that leads out is refused, also one that somebody puts there in between.
"""

import os
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from secateur_server.backends.mapping import map_file
from secateur_server.errors import UriChanged, UriFailed, UriNotAllowed, UriNotFound, quote
from secateur_server.runtime.disk import DurableFile

Bytes = bytes | memoryview


# File systems keep times in steps of a few milliseconds.
TICK_NS = 20_000_000


class LocalFile:
    """A file that is open to be read.  size: in bytes."""

    def __init__(self, field: str, uri: str, roots: Sequence[Path]) -> None:
        """Errors: UriNotAllowed, UriNotFound, UriFailed."""
        self._field, self.uri = field, uri
        path = _path(field, uri, roots)
        # Not to block: to open a pipe waits for somebody to write to it.
        self._fd = _open(field, uri, path, roots, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check_inside(field, uri, self._fd, roots)
            self.opened = os.fstat(self._fd)
            if not stat.S_ISREG(self.opened.st_mode):
                raise UriFailed(field, f"{quote(uri)} is no file")
            _wait_a_tick(self.opened.st_mtime_ns)
            self.data, self._torn = map_file(self._fd)
            self.size = len(self.data)
        except BaseException:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """Errors: UriChanged, where it was written to since it was opened."""
        now, before = os.fstat(self._fd), self.opened
        is_same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not is_same or (self._torn and self._torn.is_torn):
            raise UriChanged(self._field, f"{quote(self.uri)} changed while it was read")

    def close(self) -> None:
        """Its memory stays until nobody uses it."""
        os.close(self._fd)


class LocalTarget:
    """A file that is there whole once `commit` returns, and leaves nothing before."""

    def __init__(self, field: str, uri: str, roots: Sequence[Path]) -> None:
        """Errors: UriNotAllowed, UriNotFound, UriFailed."""
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
        """Finds early what no file can replace.  Errors: UriFailed."""
        with suppress(FileNotFoundError):
            found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                raise UriFailed(self._field, f"{quote(self._uri)} is a folder")

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes all of it.  Errors: UriFailed."""
        assert self._fd is not None, "it is open"
        disk = DurableFile(self._fd)
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[disk.write(view) :]
            disk.sync()
        except OSError as error:
            raise self._failed(error) from None

    def commit(self) -> None:
        """Puts it in its place.  Errors: UriFailed."""
        try:
            folder = self._folder
            os.replace(self._unfinished, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        except OSError as error:
            raise self._failed(error) from None

    def discard(self) -> None:
        """Leaves nothing of what was not committed, and closes it."""
        if self._fd is not None:
            os.close(self._fd)
        with suppress(OSError):
            os.unlink(self._unfinished, dir_fd=self._folder)
        os.close(self._folder)

    def _failed(self, error: OSError) -> UriFailed:
        return UriFailed(
            self._field, f"{quote(self._uri)} cannot be written: {error.strerror or error}"
        )


def _wait_a_tick(written: int) -> None:
    """Waits until a further write would show in a file's time.  written: when it was, in ns."""
    age = time.time_ns() - written
    if 0 <= age < TICK_NS:
        time.sleep((TICK_NS - age) / 1e9)


def _path(field: str, uri: str, roots: Sequence[Path]) -> Path:
    """Errors: UriNotAllowed."""
    host, slash, rest = uri.removeprefix("file://").partition("/")
    path = Path(unquote(slash + rest))
    is_local = host in ("", "localhost") and path.is_absolute() and "\0" not in str(path)
    # In a name a slash cannot be; what `?` and `#` part off has no meaning here.
    if not is_local or ".." in path.parts or {"?", "#"} & set(rest) or "%2f" in rest.lower():
        raise UriNotAllowed(field, f"{quote(uri)} is not file:// and an absolute path")
    if not any(path.is_relative_to(r) or path.is_relative_to(r.resolve()) for r in roots):
        raise _outside(field, uri)
    return path


def _open(field: str, uri: str, path: Path, roots: Sequence[Path], flags: int) -> int:
    """Errors: UriNotAllowed, UriNotFound, UriFailed."""
    try:
        return os.open(path, flags)
    except OSError as error:
        # What is there outside, and what is not, is nobody's business either.
        if not _is_inside(Path(os.path.realpath(path)), roots):
            raise _outside(field, uri) from None
        if isinstance(error, FileNotFoundError):
            raise UriNotFound(field, f"there is no {quote(uri)}") from None
        raise UriFailed(field, f"{quote(uri)} cannot be opened: {error.strerror}") from None


def _check_inside(field: str, uri: str, fd: int, roots: Sequence[Path]) -> None:
    """Errors: UriNotAllowed, where an open file or folder is not under any root."""
    if not _is_inside(Path(os.readlink(f"/proc/self/fd/{fd}")), roots):
        raise _outside(field, uri)


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root.resolve()) for root in roots)


def _outside(field: str, uri: str) -> UriNotAllowed:
    return UriNotAllowed(field, f"{quote(uri)} is under no folder of the server's --allow-path")
