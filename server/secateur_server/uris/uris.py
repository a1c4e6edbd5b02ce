"""Which URIs are allowed, and what each kind of them is."""

import posixpath
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote as urlquote
from urllib.parse import unquote

from secateur_proto.index import SUFFIX
from secateur_server.devices.watch import watch
from secateur_server.errors import InvalidRequest, UriNotAllowed, quote
from secateur_server.uris.local import LocalFile, LocalTarget
from secateur_server.uris.remote import RemoteFile, RemoteTarget
from secateur_server.uris.requests import Requests
from secateur_server.wire.index import weight_map_of
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.writer import OutgoingFile, watched_parts

LOCAL = "file://"


class Uris:
    """What callers may name.

    paths: folders, absolute.  prefixes: of other URIs.  scratch: a folder for what is fetched.
    requests: makes those to remote stores.
    """

    def __init__(
        self, paths: Sequence[Path], prefixes: Sequence[str], scratch: Path, requests: Requests
    ) -> None:
        self._paths, self._prefixes = paths, prefixes
        self._scratch, self._requests = scratch, requests

    def among(self, allow: Sequence[str] | None) -> "Uris":
        """Those of them that begin with one of `allow`; all, where it is None."""
        if allow is None:
            return self
        paths = [Path(unquote(uri.removeprefix(LOCAL))) for uri in allow if uri.startswith(LOCAL)]
        others = [uri for uri in allow if not uri.startswith(LOCAL)]
        return Uris(
            _in_both(self._paths, [path for path in paths if path.is_absolute()], _is_under),
            _in_both(self._prefixes, others, _continues),
            self._scratch,
            self._requests,
        )

    def _begins(self, uri: str) -> bool:
        return any(uri.startswith(prefix.rstrip("/") + "/") for prefix in self._prefixes)

    def open(self, field: str, uri: str, held: ExitStack) -> list[MappedFile]:
        """Opens a model: a file, or an index and the shards that it names, which lie beside it.

        held: closes them.
        Errors: UriNotAllowed, UriNotFound, UriFailed, UriChanged, InvalidStateDict.
        """
        first = self._open(field, uri, held)
        if not uri.endswith(SUFFIX):
            return [first]
        weight_map, _ = weight_map_of(first.filename, first.data)
        shards = dict.fromkeys(weight_map.values())  # distinct, in their order
        return [*(self._open(field, _beside(field, uri, s), held) for s in shards), first]

    def _open(self, field: str, uri: str, held: ExitStack) -> MappedFile:
        self.check(field, uri)
        file: LocalFile | RemoteFile
        if uri.startswith(LOCAL):
            file = LocalFile(field, uri, self._paths)
        else:
            file = RemoteFile(field, uri, self._scratch, self._requests)
        held.push(_closing(file))
        return MappedFile(_name(uri), file.data, check_unchanged=file.check_unchanged)

    def check(self, field: str, uri: str) -> None:
        """Errors: UriNotAllowed."""
        if uri.startswith(LOCAL):
            return  # paths are checked where they are opened
        is_plain = "://" in uri and "::" not in uri and not {"..", "."} & set(uri.split("/"))
        is_plain = is_plain and unquote(uri) == uri and not {"?", "#", "\\"} & set(uri)
        if not is_plain or not self._begins(uri):
            raise UriNotAllowed(field, f"{quote(uri)} begins with no --allow-uri of the server")

    def write(
        self,
        field: str,
        uri: str,
        files: Sequence[OutgoingFile],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes files to a URI: all of them are there whole, or none is.

        check: is called once they are written, and raises where they are not to be there.
        Errors: UriNotAllowed, UriNotFound, UriFailed, InvalidRequest, Stopped.
        """
        if files[-1].filename.endswith(SUFFIX) != uri.endswith(SUFFIX):
            raise InvalidRequest(
                field,
                f"{quote(uri)}: shards are written beside an index, which ends in {SUFFIX}, "
                "and one file is not",
            )
        # The index comes last, under the name that the caller gave it.
        places = [*(_beside(field, uri, file.filename) for file in files[:-1]), uri]
        with ExitStack() as targets:
            opened = []
            for place, size in zip(places, (file.size for file in files), strict=True):
                target = self._target(field, place, size)
                targets.callback(target.discard)
                opened.append(target)
            for target, file in zip(opened, files, strict=True):
                target.write(watched_parts(file.parts()))
            check()
            watch().check()  # it was written to disk meanwhile, which took its time
            for target in opened:
                target.commit()

    def _target(self, field: str, uri: str, size: int) -> LocalTarget | RemoteTarget:
        self.check(field, uri)
        if uri.startswith(LOCAL):
            return LocalTarget(field, uri, self._paths)
        return RemoteTarget(field, uri, size, self._requests)


Place = TypeVar("Place", Path, str)


def _in_both(
    ours: Sequence[Place], theirs: Sequence[Place], is_in: Callable[[Place, Place], bool]
) -> list[Place]:
    """Places that are in one of `ours` and in one of `theirs`."""
    narrower = [place for place in theirs if any(is_in(place, our) for our in ours)]
    return narrower + [our for our in ours if any(is_in(our, place) for place in theirs)]


def _is_under(path: Path, root: Path) -> bool:
    """Where they lead to: a link, or `..`, may lead out."""
    return path.resolve().is_relative_to(root.resolve())


def _continues(uri: str, prefix: str) -> bool:
    return f"{uri.rstrip('/')}/".startswith(f"{prefix.rstrip('/')}/")


def _closing(file: LocalFile | RemoteFile) -> Callable[[Any, Any, Any], None]:
    """What ends the use of a file: of one that changed, no other error is worth telling."""

    def close(kind: Any, error: BaseException | None, at: Any) -> None:
        try:
            if isinstance(file, LocalFile) and isinstance(error, Exception):
                file.check_unchanged()
        finally:
            file.close()

    return close


def _name(uri: str) -> str:
    name = posixpath.basename(uri)
    return unquote(name) if uri.startswith(LOCAL) else name


def _beside(field: str, uri: str, filename: str) -> str:
    """The URI of a shard, which must lie beside its index.  Errors: UriNotAllowed."""
    if "/" in filename or filename in ("", ".", ".."):
        raise UriNotAllowed(field, f"the index names {quote(filename)}, which is not beside it")
    name = urlquote(filename) if uri.startswith(LOCAL) else filename
    return f"{uri.rpartition('/')[0]}/{name}"
