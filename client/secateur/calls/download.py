"""Downloads a checkpoint to disk; a download that breaks is resumed."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from secateur.atomic import replacing
from secateur.calls.connection import Connection
from secateur.errors import Cancelled, DataLoss, SecateurError, ServerError, Unavailable
from secateur.forms import is_model
from secateur.progress import Progress, show_progress
from secateur_proto import checkpoint_pb2, checkpoints_pb2
from secateur_proto.enums import plain_name
from secateur_proto.framing import file_header
from secateur_proto.index import SUFFIX
from secateur_proto.pruner_pb2 import Output


class Receiving:
    """One download, in as many calls as it takes.

    Args:
        connection: To the server. Without a timeout, a download continues while data arrives.
        request: The request for the whole download.
        path: A file, or a folder; all files are written whole, or none is.
    """

    def __init__(
        self, connection: Connection, request: checkpoints_pb2.DownloadRequest, path: Path
    ) -> None:
        self._connection, self._request, self._path = connection, request, path
        self._patience = connection.patience()
        self._result: checkpoints_pb2.DownloadResult | None = None
        self._received = 0
        self._targets: list[_Target] = []
        self._show: Callable[[int], None] = lambda count: None

    async def save(self, progress: Progress) -> None:
        """Downloads the files.

        Raises:
            SecateurError: The error of the last try, or a file cannot be written.
        """
        try:
            with ExitStack() as held:

                async def attempt() -> None:
                    await self._attempt(held, progress)

                await self._connection.repeat(attempt, self._patience, self._is_resumable)
                for target in self._targets:
                    target.check(self._path)
        except OSError as error:
            raise SecateurError(f"{self._path}: cannot write it: {error.strerror}") from None

    def _is_resumable(self, error: SecateurError) -> bool:
        return self._connection.is_known and isinstance(error, Unavailable | Cancelled)

    async def _attempt(self, held: ExitStack, progress: Progress) -> None:
        self._request.offset = self._received
        transport, left = self._connection.transport, self._patience.left()
        with transport.stream(transport.rpcs["Download"], self._request, left) as answers:
            message = await answers.read()
            if message is None:
                raise ServerError("the answer ended before it began")
            self._connection.is_known = True
            self._begin(message.result, held, progress)
            while message is not None:
                data = memoryview(message.data)
                await transport.write(self._write, data)
                self._show(len(data))
                message = await answers.read()
        assert self._result is not None, "the first message has it"
        if self._received < self._result.data_bytes:
            raise ServerError("the answer ended before all announced bytes arrived")

    def _begin(
        self, result: checkpoints_pb2.DownloadResult, held: ExitStack, progress: Progress
    ) -> None:
        if self._result is None:
            self._check_masks(result)
            opened = [
                _Target(file, held.enter_context(replacing(place)))
                for place, file in _places(self._path, result.files)
            ]
            self._show = held.enter_context(show_progress(progress, result.data_bytes, "download"))
            self._result, self._targets = result, opened
        elif result != self._result:
            raise DataLoss(f"{self._path}: the checkpoint is another one since the download broke")

    def _check_masks(self, result: checkpoints_pb2.DownloadResult) -> None:
        is_empty = result.data_bytes == len(file_header(()))
        output = plain_name(Output.DESCRIPTOR, self._request.output)
        if is_empty and not is_model(output):
            raise SecateurError(f"{self._request.name} has no masks: it was not pruned")

    def _write(self, data: memoryview) -> None:
        for target in self._targets:
            taken = target.write(data)
            data = data[taken:]
            self._received += taken
            if taken:
                self._patience.tries = 0
        if data:
            raise ServerError("the answer is longer than announced")


class _Target:
    """A file that is being written."""

    def __init__(self, file: checkpoint_pb2.File, target: BinaryIO) -> None:
        self._file, self._target = file, target
        self._digest, self._left = blake3(), file.size_bytes

    def write(self, data: memoryview) -> int:
        """Writes the beginning of `data` that belongs to the file, and returns its length."""
        data = data[: self._left]
        self._target.write(data)
        self._digest.update(data)
        self._left -= len(data)
        return len(data)

    def check(self, path: Path) -> None:
        """Compares the digest.

        Raises:
            DataLoss: It is another one.
        """
        if self._digest.hexdigest() != self._file.blake3:
            raise DataLoss(f"{path}: {self._file.filename} did not arrive as it was sent")


def _places(
    path: Path, files: Iterable[checkpoint_pb2.File]
) -> list[tuple[Path, checkpoint_pb2.File]]:
    """The path at which each file is written."""
    files = list(files)
    if any(Path(file.filename).name != file.filename for file in files):
        raise ServerError("the server names files outside the folder")
    if len(files) == 1:
        if path.is_dir():
            path /= files[0].filename or "model.safetensors"
        if path.suffix != ".safetensors":
            raise SecateurError(f"{path}: a checkpoint is written as .safetensors, or to a folder")
        return [(path, files[0])]
    folder = path.parent if path.name.endswith(SUFFIX) else path
    if not folder.is_dir():
        raise SecateurError(f"{path}: the model is in shards; name a folder that exists")
    return [(folder / file.filename, file) for file in files]
