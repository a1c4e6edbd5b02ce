"""Opens the sources of calls: their data, a checkpoint, or a URI. One function for each kind."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch

from secateur_server.errors import InvalidRequest, ModelTooLarge, quote
from secateur_server.operate.metrics import Metrics
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import ONE_CORE_BYTES, Scheduler
from secateur_server.state_dict.incoming import (
    NO_EXTRAS,
    OF_STREAMED,
    Extras,
    Incoming,
    held_bytes,
    open_stream,
    read_extras,
)
from secateur_server.state_dict.mapped import map_blob, open_files
from secateur_server.storage.protocol import CheckpointStore
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import StoredFile
from secateur_server.uris.local import LocalTarget
from secateur_server.uris.multipart import MultipartTarget
from secateur_server.uris.uris import UriModel, Uris
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.header import Header as FileHeader
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.reader import ByteStream, read_header
from secateur_server.wire.writer import Bytes, OutgoingFile


class HasSource(Protocol):
    """The header of an RPC that has a source."""

    data_bytes: int
    checkpoint: str
    uri: str

    def WhichOneof(self, name: Any) -> Any:  # noqa: N802 (protobuf's name)
        """Returns the name of the source that is set."""


Header = TypeVar("Header", bound=HasSource)


@dataclass(frozen=True)
class Call(Generic[Header]):
    """A call that has a source.

    Attributes:
        context: The request.
        header: Of the call.
        data: The call's data: the source itself, or scores and masks beside it.
        extras: Names of the tensors that hold scores and masks.
        streamed: Names of the tensors that are used as they arrive: Gram matrices.
    """

    context: RequestContext
    header: Header
    data: Iterator[Bytes]
    extras: Collection[str] = ()
    streamed: Collection[str] = ()


@dataclass(frozen=True)
class Sources:
    """Opens the sources that headers name.

    Attributes:
        store: Has the checkpoints.
        uris: Reads and writes URIs.
        device: Works on data that a call carries.
        max_model_bytes: The largest file that is taken into memory.
        work_memory: Bytes for one call beside its tensors.
        scheduler: Admits calls to memory.
        metrics: Counts what is sent and received.
    """

    store: CheckpointStore
    uris: Uris
    device: torch.device
    max_model_bytes: int
    work_memory: int
    scheduler: Scheduler
    metrics: Metrics

    @property
    def largest(self) -> int:
        """The bytes of the largest model that a call may carry."""
        return min(self.max_model_bytes, self.scheduler.models.limit)

    def open(
        self, call: Call[Any], keep: Receiver | None = None
    ) -> AbstractContextManager[Incoming]:
        """Opens the source of a call for a block, and reads the headers of its files.

        Args:
            call: The call.
            keep: Stores the files, if the call keeps them; else None.

        Raises:
            RequestError: The source cannot be opened, or does not fit the server's memory.
        """
        source = call.header.WhichOneof("source")
        if source == "checkpoint":
            return self._checkpoint(call)
        if source == "uri":
            return self._uri(call) if keep is None else self._kept_uri(call, keep)
        return self._data(call) if keep is None else self._kept_data(call, keep)

    @contextmanager
    def _data(self, call: Call[Any]) -> Iterator[Incoming]:
        """The data of the call, in memory."""
        is_large = call.header.data_bytes > ONE_CORE_BYTES
        device = self.device if is_large else torch.device("cpu")
        with self._received(call, 0) as (stream, header):
            # Nothing here refers to the tensors, so that they can be freed within the block.
            yield open_stream(call.context, stream, header, call.extras, call.streamed, device)

    @contextmanager
    def _kept_data(self, call: Call[Any], keep: Receiver) -> Iterator[Incoming]:
        """The data of the call, in the store."""
        if call.extras:
            raise InvalidRequest(
                "header.keep",
                "the data holds scores or masks, which cannot be kept; upload the model first, "
                "and send them beside its checkpoint",
            )
        size = call.header.data_bytes
        stream = _stream(call, is_hashed=False)
        stored = (keep.receive("", size, stream.pieces(size)),)
        stream.finish()
        memory = min(size, self.work_memory)
        with self.scheduler.model(call.context, "header.data_bytes", memory):
            yield open_files(call.context, self._map_stored(stored), stored=stored)

    @contextmanager
    def _checkpoint(self, call: Call[Any]) -> Iterator[Incoming]:
        """A checkpoint in the store."""
        context = call.context
        with self.store.open(context, context.tenant.owner, call.header.checkpoint) as opened:
            masks = map_blob(opened.masks) if opened.masks else None
            files = [map_blob(blob) for blob in opened.files]
            with self._beside(call, sum(len(file.data) for file in files)) as extras:
                yield open_files(context, files, masks, extras(), opened.record.files)

    @contextmanager
    def _uri(self, call: Call[Any]) -> Iterator[Incoming]:
        """The files of a URI, on disk."""
        context, uri = call.context, call.header.uri
        with self._uris(context).open(context, "header.uri", uri) as model:
            if model.remote_bytes > self.max_model_bytes:
                raise ModelTooLarge(
                    "header.uri",
                    f"{quote(uri)} has {model.remote_bytes} bytes; this server fetches up to "
                    f"{self.max_model_bytes} (--max-model-bytes); upload it first",
                )
            with self._beside(call, model.size) as extras, model.fetched() as files:
                yield open_files(context, files, extras=extras())

    @contextmanager
    def references(self, call: Call[Any]) -> Iterator[UriModel]:
        """Opens the files of a URI for a block, for other processes. None is fetched.

        Args:
            call: The call. Its data must be empty.

        Raises:
            RequestError: The files cannot be opened.
        """
        context, uri = call.context, call.header.uri
        with (
            self._uris(context).open(context, "header.uri", uri) as model,
            self._beside(call, model.size) as extras,
        ):
            extras()
            yield model

    @contextmanager
    def _kept_uri(self, call: Call[Any], keep: Receiver) -> Iterator[Incoming]:
        """The files of a URI, in the store."""
        with ExitStack() as admitted:
            with self._storable(call.context, call.header.uri) as model:
                extras = admitted.enter_context(self._beside(call, model.size))
                stored = _store(model, keep)
            files = self._map_stored(stored)
            yield open_files(call.context, files, None, extras(), stored)

    def _map_stored(self, files: tuple[StoredFile, ...]) -> list[MappedFile]:
        """Maps files that were just stored."""
        return [map_blob(blob) for blob in self.store.open_files("data", files)]

    @contextmanager
    def _beside(self, call: Call[Any], size: int) -> Iterator[Callable[[], Extras]]:
        """Reserves memory for mapped files of `size` bytes, and for the call's data beside them.

        Yields:
            Reads that data.
        """
        memory = min(size, self.work_memory)
        if call.header.data_bytes == 0:
            with self.scheduler.model(call.context, "header.data_bytes", memory):
                yield partial(_no_extras, call)
            return
        with self._received(call, memory) as (stream, header):
            yield lambda: read_extras(call.context, stream, header, call.extras, call.streamed)

    @contextmanager
    def _received(self, call: Call[Any], more: int) -> Iterator[tuple[ByteStream, FileHeader]]:
        """Reserves memory for the file in a call's data, and `more` bytes; reads its header."""
        stream = _stream(call)
        # The header says how much is held at once. Other calls wait before they have any of it.
        header = read_header(call.context, stream) if call.streamed else None
        size = held_bytes(header, call.streamed) if header else call.header.data_bytes
        if size > self.max_model_bytes:
            of_grams = f", with those for the largest Gram matrix, {OF_STREAMED} times its size,"
            raise ModelTooLarge(
                "header.data_bytes",
                f"{size} bytes{of_grams if call.streamed else ''} are more than this server takes "
                f"into memory, {self.largest}; upload the model first",
            )
        with self.scheduler.model(call.context, "header.data_bytes", size + more):
            yield stream, header or read_header(call.context, stream)

    def receiver(self, context: RequestContext) -> Receiver:
        """Makes a receiver that stores files for the request's tenant, within its quota."""
        tenant = context.tenant
        return Receiver(context, self.store, tenant.owner, tenant.store)

    def fetch(
        self, context: RequestContext, uri: str, receiver: Receiver
    ) -> tuple[StoredFile, ...]:
        """Stores the files of a URI.

        Args:
            context: The request.
            uri: Names a file, or the index of shards.
            receiver: Stores the files.
        """
        with self._storable(context, uri) as model:
            return _store(model, receiver)

    @contextmanager
    def _storable(self, context: RequestContext, uri: str) -> Iterator[UriModel]:
        """Opens a URI whose files the store could hold."""
        with self._uris(context).open(context, "header.uri", uri) as model:
            self.store.check_size(model.size)
            yield model

    def write(
        self,
        context: RequestContext,
        uri: str,
        files: Sequence[OutgoingFile],
        check: Callable[[], None],
    ) -> None:
        """Writes files to a destination.

        Args:
            context: The request.
            uri: The destination.
            files: To write.
            check: Called after the files are written and before they are visible, as in Uris.write.
        """
        self._uris(context).write(context, "header.destination_uri", uri, files, check)

    def shared_targets(
        self, context: RequestContext, uri: str, files: Sequence[tuple[str, int]]
    ) -> AbstractContextManager[list[LocalTarget | MultipartTarget]]:
        """Opens a target for each of some files, as Uris.shared_targets does.

        Args:
            context: The request.
            uri: The destination.
            files: Their names, and the bytes of each.
        """
        field = "header.destination_uri"
        return self._uris(context).shared_targets(context, field, uri, files)

    def _uris(self, context: RequestContext) -> Uris:
        return self.uris.among(context.tenant.allow)


def _no_extras(call: Call[Any]) -> Extras:
    ByteStream(call.data, 0).finish()
    return NO_EXTRAS


def _stream(call: Call[Any], is_hashed: bool = True) -> ByteStream:
    """The file in a call's data."""
    size = call.header.data_bytes
    if size < MIN_FILE_BYTES:
        raise InvalidRequest(
            "header.data_bytes",
            f"{size} is less than {MIN_FILE_BYTES}, the smallest size of a file",
        )
    return ByteStream(call.data, size, is_hashed)


def _store(model: UriModel, receiver: Receiver) -> tuple[StoredFile, ...]:
    """Fetches the files of a URI, and stores them."""
    stored = []
    with model.fetched() as files:
        for file in files:
            stored.append(receiver.receive(file.filename, len(file.data), [file.data]))
            file.check_unchanged()
    return tuple(stored)
