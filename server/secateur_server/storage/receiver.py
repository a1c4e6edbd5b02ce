"""Files that one call sends to the store."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from secateur_server.errors import QuotaExceeded, StoreFull
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.accounts import Upload
from secateur_server.storage.protocol import CheckpointStore
from secateur_server.storage.records import Record, StoredFile
from secateur_server.wire.writer import Bytes, OutgoingFile, track_progress


class Receiver:
    """Receives the files of one call.

    When the call ends without a checkpoint, resumable uploads are kept for a while so that a later
    call can resume them. All others are removed. A quota of None is no limit.
    """

    def __init__(
        self, context: RequestContext, store: CheckpointStore, owner: str, quota: int | None = None
    ) -> None:
        self._context = context
        self._store, self._owner, self._quota = store, owner, quota
        self._uploads: list[Upload] = []

    def receive(
        self,
        filename: str,
        size: int,
        parts: Iterable[Bytes],
        digest: str | None = None,
        offset: int = 0,
        field: str = "offset",
        is_resumable: bool = False,
    ) -> StoredFile:
        """Stores a file, of which `parts` are the bytes from `offset` on.

        The arguments and errors are those of Uploads.begin, `write` and `finish`.
        """
        upload = self._store.uploads.begin(
            self._owner, size, digest, offset, field, is_resumable, self._quota
        )
        self._uploads.append(upload)
        for part in track_progress(self._context, parts):
            self._store.uploads.write(upload, part)
        return self._store.uploads.finish(self._context, upload, filename)

    def receive_file(self, file: OutgoingFile) -> StoredFile:
        """Stores a file that the server has made. Errors are those of `receive`."""
        return self.receive(file.filename, file.size, file.parts(), file.blake3)

    def create(self, files: tuple[StoredFile, ...], masks: StoredFile | None = None) -> Record:
        """Creates a checkpoint of files that this call has received. Errors are Store.create's."""
        record = self._store.create(self._context, self._owner, files, masks, self._quota)
        self.abandon()  # the checkpoint refers to the files now
        return record

    def abandon(self) -> None:
        """Removes all uploads of this call."""
        for upload in self._uploads:
            self._store.uploads.abandon(upload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if isinstance(error, StoreFull | QuotaExceeded):
            self.abandon()  # an upload that does not fit gives back its space
        for upload in self._uploads:
            self._store.uploads.leave(upload)
