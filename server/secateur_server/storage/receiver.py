"""Files on their way into the store, for one call."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from secateur_server.errors import QuotaExceeded, StoreFull
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.accounts import Upload
from secateur_server.storage.records import Record, StoredFile
from secateur_server.storage.store import Store
from secateur_server.wire.writer import Bytes, OutgoingFile, track_progress


class Receiver:
    """What a call brings is held until it ends; what it could not end, so that it may go on.

    quota: bytes that the owner may have in the store; None is no bound.
    """

    def __init__(
        self, context: RequestContext, store: Store, owner: str, quota: int | None = None
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
        """Stores a file.

        parts: its bytes from `offset` on.  digest: hex BLAKE3, where it is known.
        field: the one of the request that has the offset.
        is_resumable: whether what has come of it is held, when the call breaks.
        Errors: InvalidRequest, InvalidStateDict, StoreFull, TakenOver, DataLoss, Cancelled.
        """
        upload = self._store.uploads.begin(
            self._owner, size, digest, offset, field, is_resumable, self._quota
        )
        self._uploads.append(upload)
        for part in track_progress(self._context, parts):
            self._store.uploads.write(upload, part)
        return self._store.uploads.finish(self._context, upload, filename)

    def receive_file(self, file: OutgoingFile) -> StoredFile:
        """Stores a file that the server has made.  Errors: StoreFull, DataLoss, Cancelled."""
        return self.receive(file.filename, file.size, file.parts(), file.blake3)

    def create(self, files: tuple[StoredFile, ...], masks: StoredFile | None = None) -> Record:
        """Makes a checkpoint of files that are here.  Errors: StoreFull, QuotaExceeded."""
        record = self._store.create(self._owner, files, masks, self._quota)
        self.abandon()  # the checkpoint holds the files now
        return record

    def abandon(self) -> None:
        """Leaves nothing of what came."""
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
            self.abandon()  # what does not fit gives back the room that it took
        for upload in self._uploads:
            self._store.uploads.leave(upload)
