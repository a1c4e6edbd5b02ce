"""file:// URIs, under folders that the operator listed.

What counts is where an open file is, as the kernel says, not what its path looked like before: a
symbolic link that leads out is refused, also one that somebody puts there in between.
"""

import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from secateur_server.devices.mapping import map_file
from secateur_server.errors import UriChanged, UriFailed, UriNotAllowed, UriNotFound, quote

Bytes = bytes | memoryview


class LocalFile:
    """A file that is open to be read."""

    def __init__(self, field: str, uri: str, roots: Sequence[Path]) -> None:
        """Errors: UriNotAllowed, UriNotFound, UriFailed."""
        self._field, self._uri = field, uri
        path = _path(field, uri, roots)
        # Not to block: to open a pipe waits for somebody to write to it.
        self._fd = _open(field, uri, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check_inside(field, uri, self._fd, roots)
            self._before = os.fstat(self._fd)
            if not stat.S_ISREG(self._before.st_mode):
                raise UriFailed(field, f"{quote(uri)} is no file")
            self.data = map_file(self._fd)
        except BaseException:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """Errors: UriChanged, where it was written to since it was opened."""
        now, before = os.fstat(self._fd), self._before
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UriChanged(self._field, f"{quote(self._uri)} changed while it was read")

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
        self._folder = _open(field, uri, path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._fd: int | None = None
        try:
            _check_inside(field, uri, self._folder, roots)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._fd = os.open(self._unfinished, flags, 0o666, dir_fd=self._folder)
        except OSError as error:
            self.discard()
            raise UriFailed(field, f"{quote(uri)} cannot be written: {error.strerror}") from None
        except BaseException:
            self.discard()
            raise

    def write(self, parts: Iterable[Bytes]) -> None:
        """Writes all of it.  Errors: UriFailed."""
        assert self._fd is not None, "it is open"
        try:
            with open(self._fd, "wb", buffering=0, closefd=False) as file:
                for part in parts:
                    view = memoryview(part)
                    while view:
                        view = view[file.write(view) :]
            os.fsync(self._fd)
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


def _path(field: str, uri: str, roots: Sequence[Path]) -> Path:
    """Errors: UriNotAllowed."""
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    is_local = parts.netloc in ("", "localhost") and path.is_absolute() and "\0" not in str(path)
    if not is_local or ".." in path.parts or parts.query or parts.fragment:
        raise UriNotAllowed(field, f"{quote(uri)} is not file:// and an absolute path")
    if not any(path.is_relative_to(r) or path.is_relative_to(r.resolve()) for r in roots):
        raise _outside(field, uri)
    return path


def _open(field: str, uri: str, path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise UriNotFound(field, f"there is no {quote(uri)}") from None
    except OSError as error:
        raise UriFailed(field, f"{quote(uri)} cannot be opened: {error.strerror}") from None


def _check_inside(field: str, uri: str, fd: int, roots: Sequence[Path]) -> None:
    """Errors: UriNotAllowed, where an open file or folder is not under any root."""
    where = Path(os.readlink(f"/proc/self/fd/{fd}"))
    if not any(where.is_relative_to(root.resolve()) for root in roots):
        raise _outside(field, uri)


def _outside(field: str, uri: str) -> UriNotAllowed:
    return UriNotAllowed(field, f"{quote(uri)} is under no folder of the server's --allow-path")
