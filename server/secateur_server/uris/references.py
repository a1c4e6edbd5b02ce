"""References to the files of a URI, by which another process opens them."""

import os
from dataclasses import dataclass

from secateur_server.backends.mapping import map_file
from secateur_server.errors import UriChanged, UriFailed, quote
from secateur_server.wire.mapped import MappedFile


@dataclass(frozen=True)
class Reference:
    """A file as the server found it, and may open it. All nodes have its path.

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

    def open(self) -> MappedFile:
        """Opens the same file in any process.

        Raises:
            UriChanged: It is not the same any more.
            UriFailed: It cannot be read there.
        """
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
                raise _changed(self.field, self.uri)

        check_unchanged()
        return MappedFile(self.filename, data, check_unchanged=check_unchanged)


def _changed(field: str, uri: str) -> UriChanged:
    return UriChanged(field, f"{quote(uri)} changed while it was read; send the request again")
