"""Sends a model to be kept: what the server has already is not sent, and what breaks goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from secateur.checkpoint import Checkpoint, decode_checkpoint
from secateur.errors import (
    Aborted,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    SecateurError,
    ServerBusy,
    Unavailable,
)
from secateur.patience import MOST_PAUSE_SECONDS, Patience
from secateur.source import Source, map_bytes
from secateur.tensors import LocalTensor
from secateur.transfer import Bytes, errors_of, parts_of
from secateur_proto import checkpoint_pb2, checkpoints_pb2
from secateur_proto.codec import Data
from secateur_proto.framing import cut, file_header, tensor_bytes

Rpc = Any


@dataclass(frozen=True)
class LocalFile:
    """A file to send.  parts: gives its bytes."""

    filename: str
    size: int
    parts: Callable[[], Iterator[Bytes]]

    def message(self) -> checkpoint_pb2.File:
        """The file as the wire has it, with its digest."""
        digest = blake3(max_threads=blake3.AUTO)
        for part in self.parts():
            digest.update(part)
        return checkpoint_pb2.File(
            filename=self.filename, size_bytes=self.size, blake3=digest.hexdigest()
        )

    def rest(self, offset: int) -> Iterator[Bytes]:
        """Its bytes from `offset` on."""
        for part in self.parts():
            view = memoryview(part)
            yield view[min(offset, len(view)) :]
            offset -= min(offset, len(view))


def files_of(model: Source) -> list[LocalFile]:
    """A model as files: those that it is read from, or one that is made of its tensors."""
    if model.paths:
        return [_file(path) for path in model.paths]
    return [_made(model.tensors, model.metadata)]


def _file(path: Path) -> LocalFile:
    data = map_bytes(path)
    return LocalFile(path.name, len(data), lambda: iter([data]))


def _made(tensors: Mapping[str, LocalTensor], metadata: Mapping[str, str]) -> LocalFile:
    described = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    header = file_header(described, metadata)
    size = len(header) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in described)
    return LocalFile("model.safetensors", size, lambda: parts_of(header, tensors))


class Sending:
    """One upload, in as many calls as it takes.

    query, upload: the rpcs, called with a request, or an iterator of them, and grpc's options.
    patience: the time for all of it; without an end it waits as long as there is progress.
    is_known: whether the server was there before.
    """

    def __init__(self, query: Rpc, upload: Rpc, patience: Patience, is_known: bool) -> None:
        self._query, self._upload, self._is_known = query, upload, is_known
        self._patience = patience
        self._shown = 0
        self.error: Exception | None = None

    def send(self, files: Sequence[LocalFile], sending: Callable[[int], None]) -> Checkpoint:
        """Sends what the server does not have.  sending: is called with the bytes of each step."""
        messages = [file.message() for file in files]
        most, tries = -1, 0
        while True:
            try:
                held = self._held(messages, is_again=tries > 0)
                self._is_known = True
                tries, most = (0, sum(held)) if sum(held) > most else (tries, most)
                return self._send(files, messages, held, sending)
            except ServerBusy as error:
                if not self._patience.wait_for(error):
                    raise
            except SecateurError as error:
                tries += 1
                # A server that was never there is no upload that broke.
                if not self._is_known or not _is_passing(error) or self._patience.is_over(tries):
                    raise error from None
                if not self._patience.pause(tries):
                    raise error from None

    def _held(self, messages: Sequence[checkpoint_pb2.File], is_again: bool) -> list[int]:
        """How much of each file the server has."""
        request = checkpoints_pb2.QueryUploadRequest(files=messages)
        left = self._patience.left()
        # Of a connection that broke grpc makes a new one, which takes a moment.
        timeout = MOST_PAUSE_SECONDS if is_again and (left is None or left > 5) else left
        with errors_of(self):
            answer = self._query(request, timeout=timeout, wait_for_ready=is_again)
        return list(answer.committed_sizes)

    def _send(
        self,
        files: Sequence[LocalFile],
        messages: Sequence[checkpoint_pb2.File],
        held: Sequence[int],
        sending: Callable[[int], None],
    ) -> Checkpoint:
        header = checkpoints_pb2.UploadHeader(
            files=[
                checkpoints_pb2.UploadFile(file=message, offset=offset)
                for message, offset in zip(messages, held, strict=True)
            ]
        )
        requests = self._requests(header, files, held, sending)
        call = self._upload.future(requests, timeout=self._patience.left())
        with errors_of(self, call):
            return decode_checkpoint(call.result())

    def _requests(
        self,
        header: checkpoints_pb2.UploadHeader,
        files: Sequence[LocalFile],
        held: Sequence[int],
        sending: Callable[[int], None],
    ) -> Iterator[checkpoints_pb2.UploadRequest | Data]:
        """Grpc pulls them in a thread of its own and hides what raises there: `error` keeps it."""
        try:
            yield checkpoints_pb2.UploadRequest(header=header)
            sent = sum(held)
            self._show(sent, sending)
            missing = zip(files, held, strict=True)
            rest = (part for file, offset in missing for part in file.rest(offset))
            for piece in cut(rest):
                yield Data(piece)
                sent += len(piece)
                self._show(sent, sending)
        except Exception as error:
            self.error = error
            raise

    def _show(self, sent: int, sending: Callable[[int], None]) -> None:
        """What is sent again is not shown again."""
        if sent > self._shown:
            sending(sent - self._shown)
            self._shown = sent


def _is_passing(error: SecateurError) -> bool:
    """Whether an upload may go on where it broke by this error.

    A server that shuts down cancels calls. What it held when it was asked may be gone since: it
    was restarted, or needed the room. What it finds damaged it does not hold any more.
    """
    is_gone = isinstance(error, InvalidRequest) and (error.field or "").endswith(".offset")
    return is_gone or isinstance(error, _PASSING)


_PASSING = (Unavailable, Aborted, DeadlineExceeded, Cancelled, DataLoss)
