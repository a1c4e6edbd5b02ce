"""Files on their way into the store, for one call."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from secateur_server.store.records import Record, StoredFile
from secateur_server.store.store import Store, Upload
from secateur_server.wire.writer import Bytes, OutgoingFile, watched_parts


class Landing:
    """What a call brings is held until it ends; what it could not end, so that it may go on."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._owner = store, owner
        self._uploads: list[Upload] = []

    def land(
        self,
        filename: str,
        size: int,
        parts: Iterable[Bytes],
        digest: str | None = None,
        offset: int = 0,
    ) -> StoredFile:
        """Stores a file.

        parts: its bytes from `offset` on.  digest: hex BLAKE3, where it is known.
        Errors: InvalidRequest, InvalidStateDict, StoreFull, TakenOver, Stopped.
        """
        upload = self._store.begin(self._owner, size, digest, offset)
        self._uploads.append(upload)
        for part in watched_parts(parts):
            self._store.write(upload, part)
        return self._store.finish(upload, filename)

    def land_file(self, file: OutgoingFile) -> StoredFile:
        """Stores a file that the server has made.  Errors: StoreFull, Stopped."""
        if self._store.held(self._owner, file.blake3, file.size) == file.size:
            return self.land(file.filename, file.size, [], file.blake3, file.size)
        return self.land(file.filename, file.size, file.parts(), file.blake3)

    def create(self, files: tuple[StoredFile, ...], masks: StoredFile | None = None) -> Record:
        """Makes a checkpoint of files that are here.  Errors: StoreFull."""
        record = self._store.create(self._owner, files, masks)
        self.abandon()  # the checkpoint holds the files now
        return record

    def abandon(self) -> None:
        """Leaves nothing of what came."""
        for upload in self._uploads:
            self._store.abandon(upload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for upload in self._uploads:
            self._store.leave(upload)
