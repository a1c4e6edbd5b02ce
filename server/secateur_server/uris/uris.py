"""Which URIs are allowed, and what each kind of them is."""

import posixpath
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote as urlquote
from urllib.parse import unquote

from secateur_proto.index import SUFFIX
from secateur_server.errors import InvalidRequest, UriNotAllowed, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import blocks_of
from secateur_server.uris.local import LocalFile, LocalTarget
from secateur_server.uris.remote import RemoteFile, RemoteTarget
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.wire.index import weight_map_of
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.writer import OutgoingFile, track_progress

LOCAL = "file://"


class Uris:
    """What callers may name.

    paths: folders, absolute.  prefixes: of other URIs.  scratch: the disk for fetched files.
    requests: makes those to remote stores.
    """

    def __init__(
        self, paths: Sequence[Path], prefixes: Sequence[str], scratch: Scratch, requests: Requests
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

    def open(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        held: ExitStack,
        admit: Callable[[int, int], None],
    ) -> list[MappedFile]:
        """Opens a model: a file, or an index and the shards that it names, which lie beside it.

        Args:
            context: The request.
            field: Of the request, for errors.
            uri: Of the file or the index.
            held: Closes the files.
            admit: Is called before the model is fetched, with its bytes, and with those of them
                that have to be fetched; raises where that is too much.

        Raises:
            RequestError: UriNotAllowed, UriNotFound, UriFailed, UriChanged, InvalidStateDict,
                StoreFull, QueueFull, or what `admit` raises.
        """
        model = [self._open(context, field, uri, held)]
        index = []
        if uri.endswith(SUFFIX):
            index = self._mapped(context, field, uri, model, held)
            weight_map, _ = weight_map_of(index[0].filename, index[0].data)
            shards = dict.fromkeys(weight_map.values())  # distinct, in their order
            model = [
                self._open(context, field, _beside(field, uri, shard), held) for shard in shards
            ]
        size = sum(file.size for file in model)
        admit(size, sum(file.size for file in model if isinstance(file, RemoteFile)))
        return self._mapped(context, field, uri, model, held) + index

    def _open(
        self, context: RequestContext, field: str, uri: str, held: ExitStack
    ) -> LocalFile | RemoteFile:
        self.check(field, uri)
        file: LocalFile | RemoteFile
        if uri.startswith(LOCAL):
            file = LocalFile(field, uri, self._paths)
        else:
            file = RemoteFile(context, field, uri, self._requests, self._prefixes)
        held.push(_closing(file))
        return file

    def _mapped(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        files: Sequence[LocalFile | RemoteFile],
        held: ExitStack,
    ) -> list[MappedFile]:
        """Fetches those files that are not local.  uri: of the whole, for errors."""
        remote = [file for file in files if isinstance(file, RemoteFile)]
        size = sum(blocks_of(file.size) for file in remote)
        held.enter_context(self._scratch.reserved(context, field, uri, size))
        for file in remote:
            file.fetch(self._scratch)
        return [
            MappedFile(_name(file.uri), file.data, check_unchanged=file.check_unchanged)
            for file in files
        ]

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
        context: RequestContext,
        field: str,
        uri: str,
        files: Sequence[OutgoingFile],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes files to a URI: all of them are there whole, or none is.

        check: is called once they are written, and raises where they are not to be there.
        Errors: UriNotAllowed, UriNotFound, UriFailed, InvalidRequest, Cancelled.
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
                target = self._target(context, field, place, size)
                targets.callback(target.discard)
                opened.append(target)
            for target, file in zip(opened, files, strict=True):
                target.write(track_progress(context, file.parts()))
            check()
            context.check()  # it was written to disk meanwhile, which took its time
            for target in opened:
                target.commit()

    def _target(
        self, context: RequestContext, field: str, uri: str, size: int
    ) -> LocalTarget | RemoteTarget:
        self.check(field, uri)
        if uri.startswith(LOCAL):
            return LocalTarget(field, uri, self._paths)
        return RemoteTarget(context, field, uri, size, self._requests, self._prefixes)


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
