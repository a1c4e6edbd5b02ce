"""The methods of a client on checkpoints: the service Checkpoints."""

import os
from collections.abc import Iterator
from typing import Any

from secateur.checkpoint import Checkpoint, decode_checkpoint, name_of
from secateur.checks import one_of
from secateur.connection import Connection
from secateur.download import Receiving
from secateur.errors import InvalidStateDict
from secateur.forms import OUTPUTS
from secateur.model import Source
from secateur.others import LEAVE_OUT, check_storable
from secateur.paths import path_of
from secateur.patience import Patience
from secateur.progress import Progress, show_progress
from secateur.source import read_source
from secateur.upload import Sending, files_of
from secateur_proto import checkpoints_pb2


class CheckpointCalls:
    """What `Client` does with checkpoints; several arguments are described there."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._rpcs = connection, connection.rpcs

    def upload(self, source: Any, progress: Progress = None, key: str | None = None) -> Checkpoint:
        """Stores a model on the server until it is deleted, expires or is evicted.

        Skips files that this caller has already uploaded. An upload that breaks is resumed, within
        the timeout.

        Args:
            source: See `Client`; not a Checkpoint.
            progress: See `Client`.
            key: See `Client`.

        Raises:
            InvalidStateDict: The model has entries that a safetensors file cannot hold.
        """
        model = read_source(source, key)
        if uri := model.place.get("uri"):
            header = checkpoints_pb2.UploadHeader(uri=uri)
            requests = [checkpoints_pb2.UploadRequest(header=header)]
            stored = self._connection.ask(self._rpcs["Upload"], requests, is_safe=False)
            return decode_checkpoint(stored)
        if not model.is_here:
            raise InvalidStateDict("a checkpoint is on the server already")
        return self._upload(model, progress, self._connection.patience())

    def _upload(self, model: Source, progress: Progress, patience: Patience) -> Checkpoint:
        check_storable("a checkpoint", model.others, LEAVE_OUT)
        files = files_of(model)
        total = sum(file.size for file in files)
        with show_progress(progress, total) as shown, self._connection.diagnosing():
            return Sending(self._connection, patience, shown).send(files)

    def download(
        self,
        checkpoint: Checkpoint | str,
        path: str | os.PathLike[str],
        output: str = "dense",
        progress: Progress = None,
    ) -> None:
        """Writes a checkpoint to a file, or its shards to a folder.

        A download that breaks is resumed, within the timeout.

        Args:
            checkpoint: A checkpoint, or its name.
            path: A .safetensors file, or a folder.
            output: See `prune`; not "none". A model that was never pruned comes as it was
                uploaded.
            progress: See `Client`.
        """
        request = checkpoints_pb2.DownloadRequest(
            name=name_of(checkpoint), output=one_of("output", output, OUTPUTS)
        )
        receiving = Receiving(self._connection, request, path_of(path))
        with self._connection.diagnosing():
            receiving.save(progress)

    def checkpoint(self, name: str) -> Checkpoint:
        """Returns the checkpoint with a name.

        Args:
            name: checkpoints/...

        Raises:
            CheckpointNotFound: This caller has none of that name.
        """
        request = checkpoints_pb2.GetRequest(name=name_of(name))
        return decode_checkpoint(self._connection.ask(self._rpcs["Get"], request))

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Yields all checkpoints of this caller, the newest first, page by page."""
        token: str | None = ""
        while token is not None:
            request = checkpoints_pb2.ListRequest(page_token=token)
            page = self._connection.ask(self._rpcs["List"], request)
            yield from map(decode_checkpoint, page.checkpoints)
            token = page.next_page_token or None

    def delete(self, checkpoint: Checkpoint | str) -> None:
        """Deletes a checkpoint; by its name also a damaged one.

        Args:
            checkpoint: A checkpoint, or its name.

        Raises:
            CheckpointNotFound: This caller has none of that name.
        """
        self._delete(checkpoint, is_there=True)

    def _delete(
        self, checkpoint: Checkpoint | str, is_there: bool, patience: Patience | None = None
    ) -> None:
        """Deletes a checkpoint; `is_there` is False if the server may have evicted it."""
        name, rpc = name_of(checkpoint), self._rpcs["Delete"]
        request = checkpoints_pb2.DeleteRequest(name=name, allow_missing=not is_there)
        self._connection.ask(rpc, request, patience, is_safe=not is_there)
