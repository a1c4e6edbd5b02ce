"""The methods of a client on checkpoints: the service Checkpoints."""

import os
from collections.abc import Sequence
from typing import Any

from secateur.calls.connection import Connection
from secateur.calls.download import Receiving
from secateur.calls.patience import Patience
from secateur.calls.upload import Sending, files_of
from secateur.checkpoint import Checkpoint, decode_checkpoint, name_of
from secateur.checks import one_of
from secateur.errors import InvalidStateDict
from secateur.forms import OUTPUTS
from secateur.literals import Form
from secateur.model import Source
from secateur.others import LEAVE_OUT, check_storable
from secateur.paths import path_of
from secateur.progress import Progress, show_progress
from secateur.source import read_source
from secateur_proto import checkpoints_pb2


class AsyncCheckpointCalls:
    """The coroutines of `secateur.CheckpointCalls`."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._transport = connection, connection.transport

    async def upload(
        self, source: Any, progress: Progress = None, key: str | None = None
    ) -> Checkpoint:
        """See `secateur.Client.upload`."""
        model = await self._transport.run(read_source, source, key)
        if uri := model.place.get("uri"):
            header = checkpoints_pb2.UploadHeader(uri=uri)
            request = checkpoints_pb2.UploadRequest(header=header)
            rpc = self._transport.rpcs["Upload"]
            return decode_checkpoint(await self._connection.ask(rpc, request, is_safe=False))
        if not model.is_here:
            raise InvalidStateDict("a checkpoint is on the server already")
        return await self._upload(model, progress, self._connection.patience())

    async def _upload(self, model: Source, progress: Progress, patience: Patience) -> Checkpoint:
        check_storable("a checkpoint", model.others, LEAVE_OUT)
        files = await self._transport.run(files_of, model)
        total = sum(file.size for file in files)
        with show_progress(progress, total) as shown:
            sending = Sending(self._connection, patience, shown)
            return await self._connection.explaining(sending.send(files))

    async def download(
        self,
        checkpoint: Checkpoint | str,
        path: str | os.PathLike[str],
        output: Form = "dense",
        progress: Progress = None,
    ) -> None:
        """See `secateur.Client.download`."""
        request = checkpoints_pb2.DownloadRequest(
            name=name_of(checkpoint), output=one_of("output", output, OUTPUTS)
        )
        receiving = Receiving(self._connection, request, path_of(path))
        await self._connection.explaining(receiving.save(progress))

    async def checkpoint(self, name: str) -> Checkpoint:
        """See `secateur.Client.checkpoint`."""
        request, rpc = checkpoints_pb2.GetRequest(name=name_of(name)), self._transport.rpcs["Get"]
        return decode_checkpoint(await self._connection.ask(rpc, request))

    async def _page(self, token: str) -> tuple[Sequence[Checkpoint], str]:
        """A page of all checkpoints of this caller, and the token of the next one, or ""."""
        request = checkpoints_pb2.ListRequest(page_token=token)
        page = await self._connection.ask(self._transport.rpcs["List"], request)
        return [decode_checkpoint(message) for message in page.checkpoints], page.next_page_token

    async def delete(self, checkpoint: Checkpoint | str) -> None:
        """See `secateur.Client.delete`."""
        await self._delete(checkpoint, is_there=True)

    async def _delete(
        self, checkpoint: Checkpoint | str, is_there: bool, patience: Patience | None = None
    ) -> None:
        """Deletes a checkpoint; `is_there` is False if the server may have evicted it."""
        name, rpc = name_of(checkpoint), self._transport.rpcs["Delete"]
        request = checkpoints_pb2.DeleteRequest(name=name, allow_missing=not is_there)
        await self._connection.ask(rpc, request, patience, is_safe=not is_there)
