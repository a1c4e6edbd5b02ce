"""Where the model of a call comes from: its data, a checkpoint, or a URI."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import torch

from secateur_server.devices.watch import Watch
from secateur_server.errors import InvalidRequest, InvalidStateDict, ModelTooLarge, quote
from secateur_server.landing import Landing
from secateur_server.mapped import Extras, map_model, of_blob
from secateur_server.messages.stream import Bytes
from secateur_server.model import Model, stored_of, values_of, without_extras
from secateur_server.operate.metrics import Metrics
from secateur_server.store.records import StoredFile
from secateur_server.store.store import Store
from secateur_server.uris.uris import Uris
from secateur_server.wire.header import MIN_FILE_BYTES
from secateur_server.wire.mapped import MappedFile
from secateur_server.wire.reader import ByteStream, read_header, read_tensors


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
    metrics: Metrics

    def watch(self, context: grpc.ServicerContext) -> Watch:
        """The watch of a call, which stops when the call has ended."""
        of_call = Watch(self.work_memory, self.store.scratch)
        if not context.add_callback(of_call.stop):
            of_call.stop()
        return of_call

    def open(
        self,
        header: HasSource,
        data: Iterator[Bytes],
        extras: Collection[str],
        owner: str,
        held: ExitStack,
        keep: Landing | None = None,
    ) -> Incoming:
        """The model of a call, of which the headers are known.

        extras: names of the tensors that hold scores and masks.  held: what ends with the call.
        keep: takes the model where it is to be in the store.
        """
        source = header.WhichOneof("source")
        if source is None and keep is None:
            return self._received(header.data_bytes, data, extras, held)
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
            landed = keep.land("", size, stream.pieces(size))
            stream.finish()
            return self._stored((landed,))
        beside = self._beside(header.data_bytes, data, extras)
        if source == "checkpoint":
            opened = held.enter_context(self.store.open(owner, header.checkpoint))
            masks = of_blob(opened.masks) if opened.masks else None
            files = [of_blob(blob) for blob in opened.files]
            return self._mapped(files, masks, beside, opened.record.files)
        if keep is not None:
            return self._stored(self.fetch(keep, header.uri), beside)
        found = self.uris.open("header.uri", header.uri, held)
        return self._mapped(found, None, beside, ())

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

    def fetch(self, landing: Landing, uri: str) -> tuple[StoredFile, ...]:
        """Stores what a URI names."""
        with ExitStack() as held:
            found = self.uris.open("header.uri", uri, held)
            files = []
            for file in found:
                files.append(landing.land(file.filename, len(file.data), [file.data]))
                file.check_unchanged()
            return tuple(files)

    def _received(
        self, file_bytes: int, data: Iterator[Bytes], extras: Collection[str], held: ExitStack
    ) -> Incoming:
        """A model that the call itself carries."""
        stream = self.stream(data, file_bytes)
        held.enter_context(self.metrics.holding(file_bytes))
        header = read_header(stream)
        model = without_extras(header, extras)

        def read(names: Collection[str] | None) -> None:
            tensors = read_tensors(stream, header, self.device)
            beside = {name: values_of(tensors.pop(name)) for name in model.catalog.extras}
            model.fill(tensors, beside, {})

        return Incoming(model, file_bytes, read, stream.digest)

    def _beside(self, file_bytes: int, data: Iterator[Bytes], extras: Collection[str]) -> Extras:
        """The scores and masks that come beside a checkpoint or a URI."""
        if file_bytes == 0:
            ByteStream(data, 0).finish()
            return {}, {}
        stream = self.stream(data, file_bytes)
        header = read_header(stream)
        for entry in header.entries:
            if entry.name not in extras:
                raise InvalidStateDict(
                    f"data[{quote(entry.name)}]", "holds no scores and no mask of the spec"
                )
        read = read_tensors(stream, header, self.device).items()
        values = {name: tensor.values() for name, tensor in read}
        return stored_of(header.entries), {n: v for n, v in values.items() if v is not None}

    def _stored(self, files: tuple[StoredFile, ...], beside: Extras = ({}, {})) -> Incoming:
        """A model that has just come into the store."""
        blobs = [of_blob(blob) for blob in self.store.open_files("data", files)]
        return self._mapped(blobs, None, beside, files)

    def _mapped(
        self,
        files: Sequence[MappedFile],
        masks: MappedFile | None,
        beside: Extras,
        stored: tuple[StoredFile, ...],
    ) -> Incoming:
        """A model in mapped memory."""

        def check_unchanged() -> None:
            for file in files:
                file.check_unchanged()

        model, read = map_model(files, masks, beside, self.device)
        digest = stored[0].blake3 if len(stored) == 1 else ""
        size = sum(len(file.data) for file in files)
        return Incoming(model, size, read, lambda: digest, check_unchanged, stored)
