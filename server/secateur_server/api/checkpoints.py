"""The service that stores checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from google.protobuf.empty_pb2 import Empty

from secateur_proto import checkpoints_pb2 as pb
from secateur_proto import pruner_pb2
from secateur_proto.checkpoint_pb2 import Checkpoint
from secateur_proto.codec import Data
from secateur_server.api.convert.checkpoint import checkpoint_message, file_message
from secateur_server.api.convert.files import check_count, decode_file, decode_files, page_token
from secateur_server.api.stream import open_request, responses
from secateur_server.errors import (
    Cancelled,
    CheckpointNotFound,
    IdleTimeout,
    InvalidRequest,
    InvalidStateDict,
    TooShort,
)
from secateur_server.outputs import OUTPUTS
from secateur_server.outputs.protocol import Output
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.mapped import map_blob, open_files
from secateur_server.state_dict.sources import Sources
from secateur_server.storage.blobs import Blob
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import Record, StoredFile
from secateur_server.storage.store import OpenCheckpoint
from secateur_server.wire.reader import ByteStream
from secateur_server.wire.writer import Bytes, OutgoingFile, chunks

MOST_PER_PAGE = 1000
MOST_QUERIED = 100_000
# The memory of an output that is made piece by piece while it is sent.
MADE_BYTES = 24 << 20


class Checkpoints:
    """The service secateur.v1.Checkpoints."""

    def __init__(self, sources: Sources) -> None:
        self._sources, self._store = sources, sources.store

    def Upload(
        self, messages: Iterator[pb.UploadRequest | Data], context: RequestContext
    ) -> Checkpoint:
        """Stores the files of a checkpoint."""
        first, data = open_request(messages, partial(self._sources.metrics.received, context))
        header = first.header
        with self._sources.receiver(context) as receiver:
            if header.uri:
                if header.files:
                    raise InvalidRequest(
                        "header.uri", "cannot be used with files; send one or the other"
                    )
                files = self._sources.fetch(context, header.uri, receiver)
            else:
                files = self._receive(receiver, header.files, data)
            try:
                blobs = [map_blob(blob) for blob in self._store.open_files("data", files)]
                open_files(context, blobs)
            except InvalidStateDict:
                receiver.abandon()
                raise
            return self._message(context.tenant.owner, receiver.create(files))

    def _receive(
        self, receiver: Receiver, files: Sequence[pb.UploadFile], data: Iterator[Bytes]
    ) -> tuple[StoredFile, ...]:
        """Receives the files of an upload, one after another."""
        wanted = decode_files(files)
        missing = sum(file.size - offset for file, offset in wanted)
        self._store.check_size(sum(file.size for file, _ in wanted))
        stream = ByteStream(data, missing, is_hashed=False)
        received = []
        if any(0 < offset < file.size for file, offset in wanted):
            self._sources.metrics.resumed()
        try:
            for index, (file, offset) in enumerate(wanted):
                pieces, field = stream.pieces(file.size - offset), f"header.files[{index}].offset"
                digest = file.blake3 or None
                receive = partial(
                    receiver.receive, file.filename, file.size, pieces, digest, offset
                )
                received.append(receive(field, is_resumable=digest is not None))
            stream.finish()
        except (Cancelled, TooShort, IdleTimeout):
            self._sources.metrics.broken()
            raise
        return tuple(received)

    def QueryUpload(
        self, message: pb.QueryUploadRequest, context: RequestContext
    ) -> pb.QueryUploadResponse:
        """Says how much of each file the server already has."""
        check_count("files", len(message.files), MOST_QUERIED)
        owner, sizes = context.tenant.owner, []
        for index, described in enumerate(message.files):
            context.check()
            file = decode_file(described, f"files[{index}]", is_digest_required=True)
            sizes.append(self._store.uploads.received(owner, file.blake3, file.size))
        return pb.QueryUploadResponse(committed_sizes=sizes)

    def Download(
        self, message: pb.DownloadRequest, context: RequestContext
    ) -> Iterator[pb.DownloadResponse | Data]:
        """Returns the files of a checkpoint."""
        output = OUTPUTS.get(message.output or pruner_pb2.OUTPUT_DENSE)
        if output is None or not output.has_data or output.needs_groups:
            raise InvalidRequest(
                "output", f"{message.output} cannot be downloaded; ask for masks or tensors"
            )
        with (
            self._store.open(context, context.tenant.owner, message.name) as opened,
            self._files(context, opened, output) as files,
        ):
            size = sum(file.size for file in files)
            if message.offset > size:
                raise InvalidRequest(
                    "offset", f"{message.offset} is more than the {size} bytes of data"
                )
            result = pb.DownloadResult(files=map(file_message, files), data_bytes=size)
            parts = chunks(context, files, message.offset)
            sent = partial(self._sources.metrics.sent, context)
            yield from responses(pb.DownloadResponse, result, parts, sent)

    @contextmanager
    def _files(
        self, context: RequestContext, opened: OpenCheckpoint, output: Output
    ) -> Iterator[list[OutgoingFile]]:
        """The files of a checkpoint in the form of an output."""
        masks = map_blob(opened.masks) if opened.masks else None
        incoming = open_files(context, [map_blob(blob) for blob in opened.files], masks)
        state_dict = incoming.state_dict
        if masks is None and output.is_stored(state_dict.catalog):
            yield [_as_stored(blob) for blob in opened.files]
            return
        scheduler = self._sources.scheduler
        memory = min(incoming.size, MADE_BYTES, scheduler.models.limit_for(context.tenant))
        with scheduler.model(context, "name", memory):
            with scheduler.cores(context, incoming.size):
                incoming.read(None)
                files = output.files(context, state_dict, state_dict.parameters, ())
            incoming.check_unchanged()
            yield files

    def Get(self, message: pb.GetRequest, context: RequestContext) -> Checkpoint:
        """Returns the description of a checkpoint."""
        owner = context.tenant.owner
        return self._message(owner, self._store.get(owner, message.name))

    def List(self, message: pb.ListRequest, context: RequestContext) -> pb.ListResponse:
        """Returns a page of the caller's checkpoints."""
        if message.page_size < 0:
            raise InvalidRequest("page_size", f"{message.page_size} is negative; send 0 or more")
        owner, before = context.tenant.owner, page_token(message.page_token)
        most = min(message.page_size or MOST_PER_PAGE, MOST_PER_PAGE)
        found = self._store.page(owner, before, most + 1)
        page = found[:most]
        return pb.ListResponse(
            checkpoints=[self._message(owner, record) for record in page],
            next_page_token=page[-1].id if len(found) > most else "",
        )

    def Delete(self, message: pb.DeleteRequest, context: RequestContext) -> Empty:
        """Deletes a checkpoint."""
        try:
            self._store.delete(context.tenant.owner, message.name)
        except CheckpointNotFound:
            if not message.allow_missing:
                raise
        return Empty()

    def _message(self, owner: str, record: Record) -> Checkpoint:
        return checkpoint_message(record, self._store.expire_time(owner, record))


def _as_stored(blob: Blob) -> OutgoingFile:
    return OutgoingFile(blob.filename, len(blob.data), blob.digest, blob.blocks, blob.blocks)
