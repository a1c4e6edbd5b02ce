"""Uploads a model; an upload that breaks is resumed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from secateur.checkpoint import Checkpoint, decode_checkpoint
from secateur.connection import Connection
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
from secateur.patience import MOST_PAUSE_SECONDS, Patience
from secateur.tensor_file import TensorFile
from secateur.transfer import errors_of
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
        self._shown = 0
        self._most_held = -1
        self.error: Exception | None = None

    def send(self, files: Sequence[LocalFile]) -> Checkpoint:
        """Sends what the server does not have of a model's files.

        Raises:
            SecateurError: The last one.
        """
        messages = [file.message() for file in files]

        def attempt() -> Checkpoint:
            held = self._held(messages)
            self._connection.is_known = True
            if sum(held) > self._most_held:
                self._most_held, self._patience.tries = sum(held), 0
            return self._send(files, messages, held)

        return self._patience.repeat(attempt, self._is_resumable)

    def _is_resumable(self, error: SecateurError) -> bool:
        # If the server never answered, no upload broke. A server that shuts down cancels calls. It
        # loses bytes when it restarts or needs the space, and then the offset is wrong. It deletes
        # bytes that it finds damaged.
        is_lost = isinstance(error, InvalidRequest) and (error.field or "").endswith(".offset")
        is_passing = isinstance(
            error, Unavailable | Aborted | DeadlineExceeded | Cancelled | DataLoss
        )
        return self._connection.is_known and (is_lost or is_passing)

    def _held(self, messages: Sequence[checkpoint_pb2.File]) -> list[int]:
        """The bytes of each file that the server has."""
        request = pb.QueryUploadRequest(files=messages)
        is_again, left = self._patience.tries > 0, self._patience.left()
        # gRPC needs a moment to replace a connection that broke.
        timeout = MOST_PAUSE_SECONDS if is_again and (left is None or left > 5) else left
        query = self._connection.rpcs["QueryUpload"]
        with errors_of(self):
            answer = query(request, timeout=timeout, wait_for_ready=is_again)
        return list(answer.committed_sizes)

    def _send(
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
        requests, left = self._requests(header, files, held), self._patience.left()
        call = self._connection.rpcs["Upload"].future(requests, timeout=left)
        with errors_of(self, call):
            return decode_checkpoint(call.result())

    def _requests(
        self, header: pb.UploadHeader, files: Sequence[LocalFile], held: Sequence[int]
    ) -> Iterator[pb.UploadRequest | Data]:
        """The messages of a call. It keeps its error in `error`, like Upload.messages."""
        try:
            yield pb.UploadRequest(header=header)
            sent = sum(held)
            self._show(sent)
            missing = zip(files, held, strict=True)
            rest = (part for file, offset in missing for part in file.rest(offset))
            for piece in cut(rest):
                yield Data(piece)
                sent += len(piece)
                self._show(sent)
        except Exception as error:
            self.error = error
            raise

    def _show(self, sent: int) -> None:
        """Bytes that are sent again are not shown again."""
        if sent > self._shown:
            self._sending(sent - self._shown)
            self._shown = sent
