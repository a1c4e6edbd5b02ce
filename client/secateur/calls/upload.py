"""Uploads a model; an upload that breaks is resumed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from secateur.calls.connection import Connection
from secateur.calls.patience import MOST_PAUSE_SECONDS, Patience
from secateur.calls.transport import Requests
from secateur.checkpoint import Checkpoint, decode_checkpoint
from secateur.errors import (
    Aborted,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    SecateurError,
    Unavailable,
)
from secateur.model import Source
from secateur.model_files import map_bytes
from secateur.tensor_file import TensorFile
from secateur_proto import checkpoint_pb2
from secateur_proto import checkpoints_pb2 as pb
from secateur_proto.codec import Data
from secateur_proto.framing import cut


@dataclass(frozen=True)
class LocalFile:
    """A file to upload.

    Attributes:
        filename: Its name in the checkpoint.
        size: In bytes.
        parts: Returns its bytes.
    """

    filename: str
    size: int
    parts: Callable[[], Iterator[bytes | memoryview]]

    def message(self) -> checkpoint_pb2.File:
        """Describes the file; this reads and hashes it."""
        digest = blake3(max_threads=blake3.AUTO)
        for part in self.parts():
            digest.update(part)
        return checkpoint_pb2.File(
            filename=self.filename, size_bytes=self.size, blake3=digest.hexdigest()
        )

    def rest(self, offset: int) -> Iterator[bytes | memoryview]:
        """Yields the bytes from an offset on."""
        for part in self.parts():
            view = memoryview(part)
            yield view[min(offset, len(view)) :]
            offset -= min(offset, len(view))


def files_of(model: Source) -> list[LocalFile]:
    """Returns the files that a model was read from, or one that is made of its tensors."""
    if model.paths:
        return [_mapped(path) for path in model.paths]
    file = TensorFile(model.tensors, model.metadata)
    return [LocalFile("model.safetensors", file.size, file.parts)]


def _mapped(path: Path) -> LocalFile:
    data = map_bytes(path)
    return LocalFile(path.name, len(data), lambda: iter([data]))


class Sending:
    """One upload, in as many calls as it takes.

    Args:
        connection: To the server.
        patience: The time for all calls; without a limit, the upload continues while there is
            progress.
        sending: Called with the bytes of each step.
    """

    def __init__(
        self, connection: Connection, patience: Patience, sending: Callable[[int], None]
    ) -> None:
        self._connection, self._patience, self._sending = connection, patience, sending
        self._transport = connection.transport
        self._shown = 0
        self._most_held = -1

    async def send(self, files: Sequence[LocalFile]) -> Checkpoint:
        """Sends what the server does not have of a model's files.

        Raises:
            SecateurError: The error of the last try.
        """
        messages = [await self._transport.run(file.message) for file in files]

        async def attempt() -> Checkpoint:
            held = await self._held(messages)
            self._connection.is_known = True
            if sum(held) > self._most_held:
                self._most_held, self._patience.tries = sum(held), 0
            return await self._send(files, messages, held)

        return await self._connection.repeat(attempt, self._patience, self._is_resumable)

    def _is_resumable(self, error: SecateurError) -> bool:
        # If the server never answered, no upload broke. A server that shuts down cancels calls. It
        # loses bytes when it restarts or needs the space, and then the offset is wrong. It deletes
        # bytes that it finds damaged.
        is_lost = isinstance(error, InvalidRequest) and (error.field or "").endswith(".offset")
        is_passing = isinstance(
            error, Unavailable | Aborted | DeadlineExceeded | Cancelled | DataLoss
        )
        return self._connection.is_known and (is_lost or is_passing)

    async def _held(self, messages: Sequence[checkpoint_pb2.File]) -> list[int]:
        """The bytes of each file that the server has."""
        request = pb.QueryUploadRequest(files=messages)
        is_again, left = self._patience.tries > 0, self._patience.left()
        # gRPC needs a moment to replace a connection that broke.
        timeout = MOST_PAUSE_SECONDS if is_again and (left is None or left > 5) else left
        query = self._transport.rpcs["QueryUpload"]
        answer = await self._transport.ask(query, request, timeout, wait_for_ready=is_again)
        return list(answer.committed_sizes)

    async def _send(
        self,
        files: Sequence[LocalFile],
        messages: Sequence[checkpoint_pb2.File],
        held: Sequence[int],
    ) -> Checkpoint:
        header = pb.UploadHeader(
            files=[
                pb.UploadFile(file=message, offset=offset)
                for message, offset in zip(messages, held, strict=True)
            ]
        )
        requests = Requests(_messages(header, files, held), self._advance())
        rpc, left = self._transport.rpcs["Upload"], self._patience.left()
        return decode_checkpoint(await self._transport.send(rpc, requests, left))

    def _advance(self) -> Callable[[int], None]:
        """A function that shows the bytes of one call; bytes that are sent again are not shown."""
        sent = 0

        def advance(count: int) -> None:
            nonlocal sent
            sent += count
            if sent > self._shown:
                self._sending(sent - self._shown)
                self._shown = sent

        return advance


def _messages(
    header: pb.UploadHeader, files: Sequence[LocalFile], held: Sequence[int]
) -> Iterator[tuple[pb.UploadRequest | Data, int]]:
    """The messages of a call, each with its bytes; what the server has counts with the header."""
    yield pb.UploadRequest(header=header), sum(held)
    missing = zip(files, held, strict=True)
    rest = (part for file, offset in missing for part in file.rest(offset))
    for piece in cut(rest):
        yield Data(piece), len(piece)
