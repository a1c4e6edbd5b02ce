"""Where the model of a call comes from: its data, a checkpoint, or a URI."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from secateur_server.errors import InvalidRequest, InvalidStateDict, ModelTooLarge, quote
from secateur_server.operate.metrics import Metrics
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import ONE_CORE_BYTES, Scheduler
from secateur_server.state_dict.mapped import Extras, map_blob, map_model
from secateur_server.state_dict.model import Model, stored_of, values_of, without_extras
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import StoredFile
from secateur_server.storage.store import Store
from secateur_server.uris.uris import Uris
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from secateur_server.wire.writer import Bytes, OutgoingFile


class HasSource(Protocol):
    """A header of any of the rpcs."""

    data_bytes: int
    checkpoint: str
    uri: str

    def WhichOneof(self, name: Any) -> Any:  # noqa: N802 (protobuf's name)
        """The source that is set."""


@dataclass(frozen=True)
class Incoming:
    """What a call works on.

    read: brings the data of the parameters of some names, or of all.
    digest: gives the hex BLAKE3 of the one file, once it is read; empty where there is none.
    check_unchanged: to be called when the data has been used.
    files: what a checkpoint of it is made of.
    """

    model: Model
    size: int
    read: Callable[[Collection[str] | None], None]
    digest: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    files: tuple[StoredFile, ...] = ()


@dataclass(frozen=True)
class Sources:
    """Opens what the headers of calls name.

    work_memory: bytes for one call beside its model.
    """

    store: Store
    uris: Uris
    device: torch.device
    max_model_bytes: int
    work_memory: int
    scheduler: Scheduler
    metrics: Metrics

    def receiver(self, context: RequestContext) -> Receiver:
        """Takes files into the store for the request's tenant, within their quota."""
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
        """The model of a call, of which the headers are known.

        extras: names of the tensors that hold scores and masks.  held: what ends with the call.
        keep: takes the model where it is to be in the store.
        """
        source = header.WhichOneof("source")
        if source is None and keep is None:
            return self._received(context, header.data_bytes, data, extras, held)
        if source is None and extras:
            raise InvalidRequest(
                "header.keep",
                "the data holds scores or masks, which are not to be kept; upload the model first, "
                "and send them beside its checkpoint",
            )
        if source is None:
            assert keep is not None, "what is not kept came above"
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
        """The file of a call's data.  Errors: InvalidRequest, ModelTooLarge."""
        if file_bytes < MIN_FILE_BYTES:
            raise InvalidRequest(
                "header.data_bytes", f"{file_bytes} is less than the {MIN_FILE_BYTES} of any file"
            )
        if is_hashed and file_bytes > self.max_model_bytes:
            raise ModelTooLarge(
                "header.data_bytes",
                f"{file_bytes} bytes; this server takes up to {self.max_model_bytes}",
            )
        return ByteStream(data, file_bytes, is_hashed)

    def _opened(
        self,
        context: RequestContext,
        uri: str,
        held: ExitStack,
        admit: Callable[[int], None],
    ) -> list[MappedFile]:
        """What a URI names.  admit: is called with its bytes before they are fetched."""

        def check(size: int, fetched: int) -> None:
            if fetched > self.max_model_bytes:
                raise ModelTooLarge(
                    "header.uri",
                    f"{quote(uri)} has {fetched} bytes; this server fetches up to "
                    f"{self.max_model_bytes} (--max-model-bytes): upload it first",
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
        """Stores what a URI names.  admit: is called with its bytes before they are fetched."""

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
        """Writes files to a destination, as Uris.write."""
        self._uris(context).write(context, "header.destination_uri", uri, files, check)

    def _received(
        self,
        context: RequestContext,
        file_bytes: int,
        data: Iterator[Bytes],
        extras: Collection[str],
        held: ExitStack,
    ) -> Incoming:
        """A model that the call itself carries."""
        stream = self.stream(data, file_bytes)
        device = self.device if file_bytes > ONE_CORE_BYTES else torch.device("cpu")
        held.enter_context(self.scheduler.model(context, "header.data_bytes", file_bytes))
        header = read_header(context, stream)
        model = without_extras(header, extras)

        def read(names: Collection[str] | None) -> None:
            tensors = read_tensors(stream, header, device)
            extra_tensors = {name: values_of(tensors.pop(name)) for name in model.catalog.extras}
            model.fill(context, tensors, extra_tensors, {})

        return Incoming(model, file_bytes, read, stream.digest)

    def _receive_extras(
        self,
        context: RequestContext,
        file_bytes: int,
        data: Iterator[Bytes],
        extras: Collection[str],
    ) -> Extras:
        """The scores and masks that come beside a checkpoint or a URI."""
        if file_bytes == 0:
            ByteStream(data, 0).finish()
            return {}, {}
        stream = self.stream(data, file_bytes)
        header = read_header(context, stream)
        for entry in header.entries:
            if entry.name not in extras:
                raise InvalidStateDict(
                    f"data[{quote(entry.name)}]", "holds no scores and no mask of the spec"
                )
        read = read_tensors(stream, header, torch.device("cpu")).items()
        values = {name: tensor.values() for name, tensor in read}
        return stored_of(header.entries), {n: v for n, v in values.items() if v is not None}

    def _stored(self, files: tuple[StoredFile, ...]) -> list[MappedFile]:
        """Files that have just come into the store."""
        return [map_blob(blob) for blob in self.store.open_files("data", files)]

    def _mapped(
        self,
        context: RequestContext,
        files: Sequence[MappedFile],
        masks: MappedFile | None,
        extra_tensors: Extras,
        stored: tuple[StoredFile, ...],
    ) -> Incoming:
        """A model in mapped memory."""

        def check_unchanged() -> None:
            for file in files:
                file.check_unchanged()

        model, read = map_model(context, files, masks, extra_tensors)
        digest = stored[0].blake3 if len(stored) == 1 else ""
        size = sum(len(file.data) for file in files)
        return Incoming(model, size, read, lambda: digest, check_unchanged, stored)
