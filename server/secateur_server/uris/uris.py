"""The URIs that callers may name: reading models from them, and writing models to them."""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote as urlquote
from urllib.parse import unquote

from secateur_proto.index import SUFFIX
from secateur_server.errors import InvalidRequest, UriNotAllowed, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import blocks_of
from secateur_server.uris.local import LocalFile, LocalTarget
from secateur_server.uris.multipart import MultipartTarget
from secateur_server.uris.references import LocalReference, Reference, RemoteReference
from secateur_server.uris.remote import RemoteFile, RemoteTarget
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.wire.index import weight_map_of
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.writer import OutgoingFile, track_progress

LOCAL, S3 = "file://", "s3://"


class Target(Protocol):
    """A file to write, as a whole or not at all."""

    def commit(self) -> None:
        """Puts the file in place."""

    def discard(self) -> None:
        """Discards the file if it was not committed."""


AnyTarget = TypeVar("AnyTarget", bound=Target)


@dataclass(frozen=True)
class UriModel:
    """A model whose files are open. Those that are remote are not fetched yet.

    Attributes:
        size: Bytes of the files, without the index.
        remote_bytes: Bytes of the remote ones among them.
        fetched: Fetches the remote files for a block, and maps all of them.
        references: By which other processes open the files, without the index.
        index: The index, if there is one.
        check_unchanged: Raises an error if a file has changed since it was opened.
    """

    size: int
    remote_bytes: int
    fetched: Callable[[], AbstractContextManager[list[MappedFile]]]
    references: Sequence[Reference]
    index: Sequence[MappedFile]
    check_unchanged: Callable[[], None]


class Uris:
    """The URIs that callers may name.

    Args:
        paths: Absolute folders of file:// URIs.
        prefixes: Prefixes of other URIs.
        scratch: Disk space for fetched files.
        requests: Makes requests to remote stores.
    """

    def __init__(
        self, paths: Sequence[Path], prefixes: Sequence[str], scratch: Scratch, requests: Requests
    ) -> None:
        self._paths, self._prefixes = paths, prefixes
        self._scratch, self._requests = scratch, requests

    def among(self, allow: Sequence[str] | None) -> "Uris":
        """Narrows the allowed URIs to those of a tenant.

        Args:
            allow: Prefixes of the tenant's URIs; None: all.
        """
        if allow is None:
            return self
        paths = [Path(unquote(uri.removeprefix(LOCAL))) for uri in allow if uri.startswith(LOCAL)]
        others = [uri for uri in allow if not uri.startswith(LOCAL)]
        return Uris(
            _in_both(self._paths, [path for path in paths if path.is_absolute()], _is_under),
            _in_both(self._prefixes, others, _is_below),
            self._scratch,
            self._requests,
        )

    def _is_allowed(self, uri: str) -> bool:
        return any(uri.startswith(prefix.rstrip("/") + "/") for prefix in self._prefixes)

    @contextmanager
    def open(self, context: RequestContext, field: str, uri: str) -> Iterator[UriModel]:
        """Opens a model: a file, or an index and the shards that it names, which lie beside it.

        Args:
            context: The request.
            field: Of the request, for errors.
            uri: Of the file or the index.

        Raises:
            RequestError: UriNotAllowed, UriNotFound, UriFailed, UriChanged, InvalidStateDict,
                StoreFull or QueueFull.
        """
        with ExitStack() as opened:
            files = [opened.enter_context(self._open(context, field, uri))]
            index: list[MappedFile] = []
            if uri.endswith(SUFFIX):
                index = opened.enter_context(self._fetched(context, field, uri, files))
                weight_map, _ = weight_map_of(index[0].filename, index[0].data)
                shards = dict.fromkeys(weight_map.values())  # distinct, in their order
                places = (_beside(field, uri, shard) for shard in shards)
                files = [opened.enter_context(self._open(context, field, at)) for at in places]
            size = sum(file.size for file in files)
            remote_bytes = sum(file.size for file in files if isinstance(file, RemoteFile))
            fetched = partial(self._fetched, context, field, uri, files, index)
            references = [self._reference(field, file) for file in files]
            check = partial(_check_unchanged, [*files, *index])
            yield UriModel(size, remote_bytes, fetched, references, index, check)

    def _reference(self, field: str, file: LocalFile | RemoteFile) -> Reference:
        uri, name, size = file.uri, _name(file.uri), file.size
        if isinstance(file, LocalFile):
            return LocalReference(field, uri, name, file.real_path, size, file.opened.st_mtime_ns)
        prefixes, timeout = tuple(self._prefixes), self._requests.timeout
        return RemoteReference(field, uri, name, size, file.version, prefixes, timeout)

    @contextmanager
    def _open(
        self, context: RequestContext, field: str, uri: str
    ) -> Iterator[LocalFile | RemoteFile]:
        """Opens a file. If a local file changes within the block, that error replaces others."""
        self.check(field, uri)
        if not uri.startswith(LOCAL):
            yield RemoteFile(context, field, uri, self._requests, self._prefixes)
            return
        file = LocalFile(field, uri, self._paths)
        try:
            yield file
        except Exception:
            file.check_unchanged()
            raise
        finally:
            file.close()

    @contextmanager
    def _fetched(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        files: Sequence[LocalFile | RemoteFile],
        index: Sequence[MappedFile] = (),
    ) -> Iterator[list[MappedFile]]:
        """Fetches the remote ones of `files`. `uri` is that of the model, for errors."""
        remote = [file for file in files if isinstance(file, RemoteFile)]
        size = sum(blocks_of(file.size) for file in remote)
        with self._scratch.reserved(context, field, uri, size):
            for file in remote:
                file.fetch(self._scratch)
            mapped = [
                MappedFile(_name(file.uri), file.data, check_unchanged=file.check_unchanged)
                for file in files
            ]
            yield [*mapped, *index]

    def check(self, field: str, uri: str) -> None:
        """Refuses a URI that the operator has not allowed. LocalFile checks file:// URIs itself.

        Args:
            field: Of the request, for errors.
            uri: To check.

        Raises:
            UriNotAllowed: No prefix allows it.
        """
        if uri.startswith(LOCAL):
            return
        is_plain = "://" in uri and "::" not in uri and not {"..", "."} & set(uri.split("/"))
        is_plain = is_plain and unquote(uri) == uri and not {"?", "#", "\\"} & set(uri)
        if not is_plain or not self._is_allowed(uri):
            raise UriNotAllowed(field, f"{quote(uri)} is not under an --allow-uri of the server")

    def write(
        self,
        context: RequestContext,
        field: str,
        uri: str,
        files: Sequence[OutgoingFile],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes files to a URI: all of them, or none.

        Args:
            context: The request.
            field: Of the request, for errors.
            uri: Of the file, or of the index, which is the last of `files`.
            files: To write.
            check: Called before the files are put in place. Raises an error to discard them.

        Raises:
            RequestError: UriNotAllowed, UriNotFound, UriFailed, InvalidRequest, QueueFull,
                Cancelled, or an error of `check`.
        """
        described = [(file.filename, file.size) for file in files]
        with self._targets(field, uri, described, partial(self._target, context)) as targets:
            for target, file in zip(targets, files, strict=True):
                target.write(track_progress(context, file.parts()))
            commit(context, targets, check)

    def shared_targets(
        self, context: RequestContext, field: str, uri: str, files: Sequence[tuple[str, int]]
    ) -> AbstractContextManager[list[LocalTarget | MultipartTarget]]:
        """Opens a target for each of some files for a block, to which other processes write.

        Those that the block does not commit are discarded.

        Args:
            context: The request.
            field: Of the request, for errors.
            uri: Of the file, or of the index, which is the last of `files`. file:// or s3://.
            files: Their names, and the bytes of each.

        Raises:
            RequestError: UriNotAllowed, UriNotFound, UriFailed, InvalidRequest or QueueFull.
        """
        return self._targets(field, uri, files, partial(self._shared_target, context))

    @contextmanager
    def _targets(
        self,
        field: str,
        uri: str,
        files: Sequence[tuple[str, int]],
        make: Callable[[str, str, int], AnyTarget],
    ) -> Iterator[list[AnyTarget]]:
        if files[-1][0].endswith(SUFFIX) != uri.endswith(SUFFIX):
            raise InvalidRequest(
                field,
                f"{quote(uri)} must end in {SUFFIX} if the model has shards, and must not if it is "
                "one file",
            )
        # The index comes last, under the name that the caller gave it.
        places = [*(_beside(field, uri, name) for name, _ in files[:-1]), uri]
        with ExitStack() as discarded:
            opened = []
            for place, (_, size) in zip(places, files, strict=True):
                target = make(field, place, size)
                discarded.callback(target.discard)
                opened.append(target)
            yield opened

    def _shared_target(
        self, context: RequestContext, field: str, uri: str, size: int
    ) -> LocalTarget | MultipartTarget:
        self.check(field, uri)
        if uri.startswith(LOCAL):
            return LocalTarget(field, uri, self._paths)
        return MultipartTarget(context, field, uri, self._requests, self._prefixes)

    def _target(
        self, context: RequestContext, field: str, uri: str, size: int
    ) -> LocalTarget | RemoteTarget:
        self.check(field, uri)
        if uri.startswith(LOCAL):
            return LocalTarget(field, uri, self._paths)
        return RemoteTarget(context, field, uri, size, self._requests, self._prefixes)


def commit(
    context: RequestContext,
    targets: Sequence[Target],
    check: Callable[[], None],
) -> None:
    """Puts written files in place, unless `check` raises an error, or the request was cancelled."""
    check()
    context.check()  # writing and syncing took time
    for target in targets:
        target.commit()


def _check_unchanged(files: Sequence[LocalFile | RemoteFile | MappedFile]) -> None:
    for file in files:
        file.check_unchanged()


Place = TypeVar("Place", Path, str)


def _in_both(
    ours: Sequence[Place], theirs: Sequence[Place], is_in: Callable[[Place, Place], bool]
) -> list[Place]:
    """The intersection of two lists of folders or prefixes."""
    narrower = [place for place in theirs if any(is_in(place, our) for our in ours)]
    return narrower + [our for our in ours if any(is_in(our, place) for place in theirs)]


def _is_under(path: Path, root: Path) -> bool:
    """Whether a path is under a root, after links and `..` are resolved."""
    return path.resolve().is_relative_to(root.resolve())


def _is_below(uri: str, prefix: str) -> bool:
    return f"{uri.rstrip('/')}/".startswith(f"{prefix.rstrip('/')}/")


def _name(uri: str) -> str:
    name = posixpath.basename(uri)
    return unquote(name) if uri.startswith(LOCAL) else name


def _beside(field: str, uri: str, filename: str) -> str:
    """The URI of a shard. Raises UriNotAllowed if it is not beside its index."""
    if "/" in filename or filename in ("", ".", ".."):
        raise UriNotAllowed(
            field, f"the index names {quote(filename)}, which is not in the same folder"
        )
    name = urlquote(filename) if uri.startswith(LOCAL) else filename
    return f"{uri.rpartition('/')[0]}/{name}"
