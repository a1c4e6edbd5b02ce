"""Opens the sources of calls: their data, a checkpoint, or a URI. One function for each kind."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from secateur_server.errors import InvalidRequest, ModelTooLarge, quote
from secateur_server.operate.metrics import Metrics
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import ONE_CORE_BYTES, Scheduler
from secateur_server.state_dict.incoming import (
    NO_EXTRAS,
    Extras,
    Incoming,
    open_stream,
    read_extras,
)
from secateur_server.state_dict.mapped import map_blob, open_files
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import StoredFile
from secateur_server.storage.store import Store
from secateur_server.uris.uris import UriModel, Uris
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.reader import ByteStream
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
    """

    context: RequestContext
    header: Header
    data: Iterator[Bytes]
    extras: Collection[str] = ()


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

    store: Store
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
        size = call.header.data_bytes
        stream = self._stream(call)
        device = self.device if size > ONE_CORE_BYTES else torch.device("cpu")
        with self.scheduler.model(call.context, "header.data_bytes", size):
            # Nothing here refers to the tensors, so that they can be freed within the block.
            yield open_stream(call.context, stream, call.extras, device)

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
        stream = self._stream(call, is_hashed=False)
        stored = (keep.receive("", size, stream.pieces(size)),)
        stream.finish()
        memory = min(size, self.work_memory)
        with self.scheduler.model(call.context, "header.data_bytes", memory):
            yield open_files(call.context, self._map_stored(stored), stored=stored)

    @contextmanager
    def _checkpoint(self, call: Call[Any]) -> Iterator[Incoming]:
        """A checkpoint in the store."""
        context = call.context
        with self.store.open(context.tenant.owner, call.header.checkpoint) as opened:
            masks = map_blob(opened.masks) if opened.masks else None
            files = [map_blob(blob) for blob in opened.files]
            with self._admitted(call, sum(len(file.data) for file in files)):
                extras = self._extras(call)
                yield open_files(context, files, masks, extras, opened.record.files)

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
            with self._admitted(call, model.size), model.fetched() as files:
                yield open_files(context, files, extras=self._extras(call))

    @contextmanager
    def _kept_uri(self, call: Call[Any], keep: Receiver) -> Iterator[Incoming]:
        """The files of a URI, in the store."""
        with ExitStack() as admitted:
            with self._storable(call.context, call.header.uri) as model:
                admitted.enter_context(self._admitted(call, model.size))
                stored = _store(model, keep)
            files = self._map_stored(stored)
            yield open_files(call.context, files, None, self._extras(call), stored)

    def _admitted(self, call: Call[Any], size: int) -> AbstractContextManager[None]:
        """Reserves memory for mapped files of `size` bytes, and for extras."""
        memory = min(size, self.work_memory) + call.header.data_bytes
        return self.scheduler.model(call.context, "header.data_bytes", memory)

    def _map_stored(self, files: tuple[StoredFile, ...]) -> list[MappedFile]:
        """Maps files that were just stored."""
        return [map_blob(blob) for blob in self.store.open_files("data", files)]

    def _extras(self, call: Call[Any]) -> Extras:
        """The scores and masks beside a checkpoint or a URI."""
        if call.header.data_bytes == 0:
            ByteStream(call.data, 0).finish()
            return NO_EXTRAS
        return read_extras(call.context, self._stream(call), call.extras)

    def _stream(self, call: Call[Any], is_hashed: bool = True) -> ByteStream:
        """The file in a call's data. Only a hashed file is taken into memory."""
        size = call.header.data_bytes
        if size < MIN_FILE_BYTES:
            raise InvalidRequest(
                "header.data_bytes",
                f"{size} is less than {MIN_FILE_BYTES}, the smallest size of a file",
            )
        if is_hashed and size > self.max_model_bytes:
            raise ModelTooLarge(
                "header.data_bytes",
                f"{size} bytes are more than this server takes into memory, {self.largest}; "
                "upload the model first",
            )
        return ByteStream(call.data, size, is_hashed)

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

    def _uris(self, context: RequestContext) -> Uris:
        return self.uris.among(context.tenant.allow)


def _store(model: UriModel, receiver: Receiver) -> tuple[StoredFile, ...]:
    """Fetches the files of a URI, and stores them."""
    stored = []
    with model.fetched() as files:
        for file in files:
            stored.append(receiver.receive(file.filename, len(file.data), [file.data]))
            file.check_unchanged()
    return tuple(stored)
