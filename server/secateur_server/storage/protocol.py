"""What calls need of a store of checkpoints."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from secateur_server.runtime.context import RequestContext
from secateur_server.storage.blobs import Blob
from secateur_server.storage.records import Record, StoredFile
from secateur_server.storage.store import OpenCheckpoint
from secateur_server.storage.uploads import Uploads


class CheckpointStore(Protocol):
    """The checkpoints of all callers. Each method has the errors of Store's."""

    @property
    def uploads(self) -> Uploads:
        """The uploads of all callers to this server."""

    @property
    def scratch(self) -> Path:
        """A folder for files of calls, which is emptied at the start."""

    @property
    def disk_limit(self) -> int:
        """Bytes that the store may have on the disk of this server."""

    @property
    def max_bytes(self) -> float:
        """The limit of all checkpoints."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all checkpoints."""

    @property
    def count(self) -> int:
        """The number of checkpoints."""

    def get(self, owner: str, name: str) -> Record:
        """Returns the record of a checkpoint."""

    def expire_time(self, owner: str, record: Record) -> float | None:
        """Returns when a checkpoint expires, in seconds since 1970; None: never."""

    def page(self, owner: str, before: str, most: int) -> Sequence[Record]:
        """Returns up to `most` checkpoints older than the id `before`; the newest first."""

    def open(
        self, context: RequestContext, owner: str, name: str
    ) -> AbstractContextManager[OpenCheckpoint]:
        """Opens a checkpoint for a block."""

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that a caller has uploaded to this server."""

    def create(
        self,
        context: RequestContext,
        owner: str,
        files: tuple[StoredFile, ...],
        masks: StoredFile | None = None,
        quota: int | None = None,
    ) -> Record:
        """Creates a checkpoint of uploaded files."""

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint."""

    def check_size(self, size: int) -> None:
        """Raises StoreFull if `size` bytes would never fit."""

    def close(self) -> None:
        """Stops all background work."""
