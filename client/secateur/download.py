"""Brings a checkpoint to this machine, straight to disk."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from secateur.atomic import replacing
from secateur.errors import DataLoss, SecateurError, ServerError
from secateur.progress import Progress, show_progress
from secateur_proto import checkpoint_pb2
from secateur_proto.index import SUFFIX


def save_answer(messages: Iterable[Any], path: Path, progress: Progress) -> None:
    """Writes the files of an answer: one to a .safetensors file, shards into a folder.

    All are there whole, or none is.  Errors: SecateurError.
    """
    answer = iter(messages)
    first = next(answer)
    result = first.result
    places = _places(path, result.files)
    try:
        with (
            show_progress(progress, result.data_bytes, "download") as receiving,
            ExitStack() as files,
        ):
            data = _Data(first.data, answer, receiving)
            opened = [(file, files.enter_context(replacing(place))) for place, file in places]
            for file, target in opened:
                _write(data, file, target, path)
    except OSError as error:
        raise SecateurError(f"{path}: cannot write it: {error.strerror}") from None


def _write(data: "_Data", file: checkpoint_pb2.File, target: BinaryIO, path: Path) -> None:
    digest, left = blake3(), file.size_bytes
    while left:
        piece = data.take(left)
        digest.update(piece)
        target.write(piece)
        left -= len(piece)
    if digest.hexdigest() != file.blake3:
        raise DataLoss(f"{path}: {file.filename} did not arrive as it was sent")


class _Data:
    """The data of messages, as one stream."""

    def __init__(self, first: bytes, rest: Any, receiving: Callable[[int], None]) -> None:
        self._piece, self._rest, self._receiving = memoryview(first), rest, receiving

    def take(self, most: int) -> memoryview:
        """Up to `most` bytes, at least one.  Errors: ServerError."""
        while not self._piece:
            message = next(self._rest, None)
            if message is None:
                raise ServerError("the answer ended before all that was announced had come")
            self._piece = memoryview(message.data)
        taken, self._piece = self._piece[:most], self._piece[most:]
        self._receiving(len(taken))
        return taken


def _places(
    path: Path, files: Iterable[checkpoint_pb2.File]
) -> list[tuple[Path, checkpoint_pb2.File]]:
    """Where each file goes.  Errors: SecateurError."""
    files = list(files)
    if any(Path(file.filename).name != file.filename for file in files):
        raise ServerError("the server names files that are none")
    if len(files) == 1:
        if path.is_dir():
            path /= files[0].filename or "model.safetensors"
        if path.suffix != ".safetensors":
            raise SecateurError(f"{path}: a checkpoint is written as .safetensors, or to a folder")
        return [(path, files[0])]
    folder = path.parent if path.name.endswith(SUFFIX) else path
    if not folder.is_dir():
        raise SecateurError(f"{path}: the model is in shards; name a folder, which must be there")
    return [(folder / file.filename, file) for file in files]
