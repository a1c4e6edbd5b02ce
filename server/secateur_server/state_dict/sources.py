"""Sources of a call's tensors: its data, a checkpoint, or a URI."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from secateur_server.errors import InvalidRequest, InvalidStateDict, ModelTooLarge, quote
from secateur_server.operate.metrics import Metrics
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import ONE_CORE_BYTES, Scheduler
from secateur_server.state_dict.mapped import Extras, map_blob, map_state_dict
from secateur_server.state_dict.state_dict import StateDict, stored_of, values_of, without_extras
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import StoredFile
from secateur_server.storage.store import Store
from secateur_server.uris.uris import Uris
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from secateur_server.wire.writer import Bytes, OutgoingFile


class HasSource(Protocol):
    """The header of an RPC that has a source."""

    data_bytes: int
    checkpoint: str
    uri: str

    def WhichOneof(self, name: Any) -> Any:  # noqa: N802 (protobuf's name)
        """Returns the name of the source that is set."""


@dataclass(frozen=True)
class Incoming:
    """The tensors that a call works on.

    Attributes:
        state_dict: Its headers are known; `read` fills in the data.
        size: Bytes of all files.
        read: Reads the data of the parameters of some names; None reads all.
        digest: Returns the hex BLAKE3 of a single file once it is read, or an empty text.
        check_unchanged: To be called after the data was used. Raises if a file has changed.
        files: The stored files, of which a new checkpoint can be made.
    """

    state_dict: StateDict
    size: int
    read: Callable[[Collection[str] | None], None]
    digest: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    files: tuple[StoredFile, ...] = ()


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

    def receiver(self, context: RequestContext) -> Receiver:
        """Makes a receiver that stores files for the request's tenant, within its quota."""
        tenant = context.tenant
        return Receiver(context, self.store, tenant.owner, tenant.store)

    def open(
        self,
        context: RequestContext,
        header: HasSource,
        data: Iterator[Bytes],
        extras: Collection[str],
        held: ExitStack,
        keep: Receiver | None = None,
    ) -> Incoming:
        """Opens the source of a call and reads the headers of its files.

        Args:
            context: The request.
            header: Of the call.
            data: The call's data.
            extras: Names of the tensors that hold scores and masks.
            held: Receives the resources to release when the call ends.
            keep: Stores the files, if the call keeps them; else None.

        Returns:
            The state_dict, whose data is not read yet.

        Raises:
            InvalidRequest: The data holds scores or masks, and is to be kept.
        """
        source = header.WhichOneof("source")
        if source is None and keep is None:
            return self._received(context, header.data_bytes, data, extras, held)
        if source is None and extras:
            raise InvalidRequest(
                "header.keep",
                "the data holds scores or masks, which cannot be kept; upload the model first, "
                "and send them beside its checkpoint",
            )
        if source is None:
            assert keep is not None, "data that is not kept returned above"
            stream = self.stream(data, header.data_bytes, is_hashed=False)
            size = header.data_bytes
            received = keep.receive("", size, stream.pieces(size))
            stream.finish()
            room = self.scheduler.model(context, "header.data_bytes", min(size, self.work_memory))
            held.enter_context(room)
            return self._mapped(context, self._stored((received,)), None, ({}, {}), (received,))

        def admit(size: int) -> None:
            in_memory = min(size, self.work_memory) + header.data_bytes
            held.enter_context(self.scheduler.model(context, "header.data_bytes", in_memory))

        if source == "checkpoint":
            owner = context.tenant.owner
            opened = held.enter_context(self.store.open(owner, header.checkpoint))
            masks = map_blob(opened.masks) if opened.masks else None
            files = [map_blob(blob) for blob in opened.files]
            stored = opened.record.files
            admit(sum(len(file.data) for file in files))
        elif keep is not None:
            masks, stored = None, self.fetch(context, keep, header.uri, admit)
            files = self._stored(stored)
        else:
            masks, stored = None, ()
            files = self._opened(context, header.uri, held, admit)
        return self._mapped(
            context,
            files,
            masks,
            self._receive_extras(context, header.data_bytes, data, extras),
            stored,
        )

    def stream(self, data: Iterator[Bytes], file_bytes: int, is_hashed: bool = True) -> ByteStream:
        """Makes a stream of the file in a call's data.

        Args:
            data: The call's data.
            file_bytes: The size that the header declares.
            is_hashed: Whether to hash the file. Only such a file is taken into memory.

        Returns:
            The stream.

        Raises:
            InvalidRequest: The size is less than that of any file.
            ModelTooLarge: The size is more than the server takes into memory.
        """
        if file_bytes < MIN_FILE_BYTES:
            raise InvalidRequest(
                "header.data_bytes",
                f"{file_bytes} is less than {MIN_FILE_BYTES}, the smallest size of a file",
            )
        if is_hashed and file_bytes > self.max_model_bytes:
            raise ModelTooLarge(
                "header.data_bytes",
                f"{file_bytes} bytes are more than this server takes into memory, "
                f"{self.max_model_bytes}; upload the model first",
            )
        return ByteStream(data, file_bytes, is_hashed)

    def _opened(
        self,
        context: RequestContext,
        uri: str,
        held: ExitStack,
        admit: Callable[[int], None],
    ) -> list[MappedFile]:
        """Opens the files of a URI. Calls `admit` with their bytes before it fetches them."""

        def check(size: int, fetched: int) -> None:
            if fetched > self.max_model_bytes:
                raise ModelTooLarge(
                    "header.uri",
                    f"{quote(uri)} has {fetched} bytes; this server fetches up to "
                    f"{self.max_model_bytes} (--max-model-bytes); upload it first",
                )
            admit(size)

        return self._uris(context).open(context, "header.uri", uri, held, check)

    def fetch(
        self,
        context: RequestContext,
        receiver: Receiver,
        uri: str,
        admit: Callable[[int], None] = lambda size: None,
    ) -> tuple[StoredFile, ...]:
        """Stores the files of a URI.

        Args:
            context: The request.
            receiver: Stores the files.
            uri: Names a file or a folder.
            admit: Called with the bytes of all files before they are fetched.

        Returns:
            The stored files.
        """

        def check(size: int, fetched: int) -> None:
            self.store.check_size(size)
            admit(size)

        with ExitStack() as held:
            found = self._uris(context).open(context, "header.uri", uri, held, check)
            files = []
            for file in found:
                files.append(receiver.receive(file.filename, len(file.data), [file.data]))
                file.check_unchanged()
            return tuple(files)

    def _uris(self, context: RequestContext) -> Uris:
        return self.uris.among(context.tenant.allow)

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

    def _received(
        self,
        context: RequestContext,
        file_bytes: int,
        data: Iterator[Bytes],
        extras: Collection[str],
        held: ExitStack,
    ) -> Incoming:
        """The state_dict that the call itself carries."""
        stream = self.stream(data, file_bytes)
        device = self.device if file_bytes > ONE_CORE_BYTES else torch.device("cpu")
        held.enter_context(self.scheduler.model(context, "header.data_bytes", file_bytes))
        header = read_header(context, stream)
        state_dict = without_extras(header, extras)

        def read(names: Collection[str] | None) -> None:
            tensors = read_tensors(stream, header, device)
            extra_tensors = {
                name: values_of(tensors.pop(name)) for name in state_dict.catalog.extras
            }
            state_dict.fill(context, tensors, extra_tensors, {})

        return Incoming(state_dict, file_bytes, read, stream.digest)

    def _receive_extras(
        self,
        context: RequestContext,
        file_bytes: int,
        data: Iterator[Bytes],
        extras: Collection[str],
    ) -> Extras:
        """The scores and masks that a call sends beside a checkpoint or a URI."""
        if file_bytes == 0:
            ByteStream(data, 0).finish()
            return {}, {}
        stream = self.stream(data, file_bytes)
        header = read_header(context, stream)
        for entry in header.entries:
            if entry.name not in extras:
                raise InvalidStateDict(
                    f"data[{quote(entry.name)}]",
                    "the spec does not use it as scores or a mask; send only tensors that it names",
                )
        read = read_tensors(stream, header, torch.device("cpu")).items()
        values = {name: tensor.values() for name, tensor in read}
        return stored_of(header.entries), {n: v for n, v in values.items() if v is not None}

    def _stored(self, files: tuple[StoredFile, ...]) -> list[MappedFile]:
        """Maps files that were just stored."""
        return [map_blob(blob) for blob in self.store.open_files("data", files)]

    def _mapped(
        self,
        context: RequestContext,
        files: Sequence[MappedFile],
        masks: MappedFile | None,
        extra_tensors: Extras,
        stored: tuple[StoredFile, ...],
    ) -> Incoming:
        """A state_dict in mapped files."""

        def check_unchanged() -> None:
            for file in files:
                file.check_unchanged()

        state_dict, read = map_state_dict(context, files, masks, extra_tensors)
        digest = stored[0].blake3 if len(stored) == 1 else ""
        size = sum(len(file.data) for file in files)
        return Incoming(state_dict, size, read, lambda: digest, check_unchanged, stored)
