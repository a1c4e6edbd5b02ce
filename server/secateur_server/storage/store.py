"""The checkpoints of all callers, in one folder on disk.

checkpoints/OWNER/ID.json   records: written last, so that the blobs that they name exist
blobs/DIGEST, .sums         files: each content once, for all owners
parts/                      staged files, which are removed at the start
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    RequestError,
    StoreFailed,
    StoreFull,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import disk_errors, sync_folder
from secateur_server.storage.accounts import Account, Accounts, Entry
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.blobs import Blob
from secateur_server.storage.clock import Clock
from secateur_server.storage.eviction import EvictionPolicy
from secateur_server.storage.folders import FolderLock
from secateur_server.storage.last_uses import LastUses
from secateur_server.storage.records import (
    PREFIX,
    Found,
    Record,
    StoredFile,
    damaged_record,
    new_record,
    read_records,
    record_path,
    write_record,
)
from secateur_server.storage.removal import Removal
from secateur_server.storage.space import Space
from secateur_server.storage.uploads import Uploads

log = logging.getLogger(__name__)

# The interval between searches for expired checkpoints.
EXPIRE_SECONDS = 10.0


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint in use.

    Attributes:
        record: Its record.
        files: The weights, in the record's order.
        masks: The file of masks, if the server has pruned the checkpoint.
    """

    record: Record
    files: list[Blob]
    masks: Blob | None


class Store:
    """The checkpoints of all callers.

    Args:
        folder: Created if it does not exist.
        max_bytes: The limit of everything in the folder.
        ttl: Seconds from its last use that a checkpoint is kept; 0: for ever.
        evicted: Called with the reason of each eviction and the bytes that it freed.
        is_temporary: Whether `close` removes the folder.

    Attributes:
        uploads: The uploads of all callers.
        scratch: A folder for files of calls, which is emptied at the start.

    Raises:
        StoreInUse: Another server uses the folder.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        ttl: float,
        evicted: Callable[[str, int], None] = lambda reason, count: None,
        is_temporary: bool = False,
    ) -> None:
        self.ttl, self.max_bytes = ttl, max_bytes
        self._folder, self._is_temporary = folder, is_temporary
        self._records, self.scratch = folder / "checkpoints", folder / "parts"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder_lock = FolderLock(folder)
        self._clock, self._accounts = Clock(), Accounts()
        self._lock = self._accounts.lock
        self._blobs = BlobFolder(folder / "blobs", self._lock, self._folder_lock.check)
        index = self._blobs, self._accounts
        self._removal = Removal(self._records, *index, self._folder_lock)
        self._last_uses = LastUses(self._records, self._accounts, self._clock)
        policy = EvictionPolicy(max_bytes, self._accounts, self._blobs.references)
        self._space = Space(policy, *index, self._removal, evicted)
        self.uploads = Uploads(*index, self._removal, self._space, self.scratch, self._clock)
        try:
            for path in (self._blobs.folder, self.scratch, self._records):
                path.mkdir(exist_ok=True, mode=0o700)
            self._load()
        except BaseException:
            self._folder_lock.close()
            raise
        self._is_closed = threading.Event()
        self._expiring = threading.Thread(target=self._expire, name="expire", daemon=True)
        self._expiring.start()

    def _load(self) -> None:
        """Reads the records, and removes unfinished files and empty folders."""
        found = read_records(self._records)
        # An earlier server may have been killed before its sync. A crash now must not lose a name.
        folders = (self._folder.parent, self._folder, self._blobs.folder, self._records)
        for folder in (*folders, *found.owners):
            sync_folder(folder)
        self._add(found)
        unfinished = [*self.scratch.iterdir(), *found.unfinished]
        if not found.unreadable:  # the blobs of damaged records are unknown
            unfinished += self._blobs.unknown()
        count = sum(path.stat().st_size for path in unfinished)
        for path in unfinished:
            path.unlink()
        for folder in found.owners:
            self._removal.remove_folder(folder.name)
        log.info(
            "store %s: %d checkpoints, %d bytes; removed %d unfinished files of %d bytes",
            *(self._folder, len(found.records), self.used_bytes, len(unfinished), count),
        )

    def _add(self, found: Found) -> None:
        """Adds the checkpoints on disk to the index, the least recently used first."""
        self._unreadable = found.unreadable
        now = self._clock.wall(self._clock.now())
        for used, owner, record in sorted(found.records, key=lambda each: each[0]):
            entry = Entry(owner, record, self._clock.moment(used))
            self._removal.count(entry)
            account = self._accounts.get_or_create(owner)
            account.add(entry)
            account.is_folder_synced = True
            if used > now:  # the system's clock has been set back
                self._last_uses.write(entry)

    def close(self) -> None:
        """Stops all background work, and releases the folder for another server."""
        self._is_closed.set()
        self._expiring.join()
        self.uploads.close()
        if self._is_temporary and self._folder_lock.is_in_place:
            shutil.rmtree(self._folder, ignore_errors=True)  # a cleaner of /tmp may have removed it
        self._folder_lock.close()

    @property
    def disk_limit(self) -> int:
        """Bytes that the store may have on disk."""
        return self.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those of staged files that are about to be written."""
        return self._space.used_bytes

    @property
    def count(self) -> int:
        """The number of checkpoints."""
        with self._lock:
            return sum(len(account.entries) for account in self._accounts.by_owner.values())

    def get(self, owner: str, name: str) -> Record:
        """The record of a checkpoint.

        Raises:
            CheckpointNotFound: The owner has no checkpoint of that name.
            DataLoss: Its record is damaged.
        """
        with self._lock:
            return self._entry(owner, name).record

    def expire_time(self, owner: str, record: Record) -> float | None:
        """The time at which a checkpoint expires, in seconds since 1970; None: never."""
        with self._lock:
            entry = self._accounts.get(owner).entries.get(record.id)
        return self._clock.wall(entry.used + self.ttl) if self.ttl and entry else None

    def has(self, owner: str, record: Record) -> bool:
        """Whether the checkpoint is here, with files that are not known to be damaged."""
        with self._lock:
            is_known = record.id in self._accounts.get(owner).entries
        return is_known and all(self._blobs.has(f.blake3, f.size) for f in record.blobs())

    def is_used(self, owner: str, record: Record) -> bool:
        """Whether a call uses the checkpoint."""
        with self._lock:
            entry = self._accounts.get(owner).entries.get(record.id)
            return entry is not None and entry.pins > 0

    def page(self, owner: str, before: str, most: int) -> Sequence[Record]:
        """Up to `most` checkpoints older than the id `before`, if it is not empty; newest first."""
        with self._lock:
            return self._accounts.get(owner).page(before, most)

    def _entry(self, owner: str, name: str) -> Entry:
        ident = name.removeprefix(PREFIX)
        if name.startswith(PREFIX):
            if entry := self._accounts.get(owner).entries.get(ident):
                return entry
            if (owner, ident) in self._unreadable:
                raise damaged_record(name)
        raise CheckpointNotFound(
            "checkpoint",
            f"{quote(name)} does not exist: it may have been deleted, evicted or expired, or "
            "belong to another token",
        )

    @contextmanager
    def open(self, context: RequestContext, owner: str, name: str) -> Iterator[OpenCheckpoint]:
        """Opens a checkpoint. It is not evicted, and its files are not removed, within the block.

        Args:
            context: The request, which may end while files are fetched.
            owner: The owner of the checkpoint.
            name: Of the checkpoint.

        Raises:
            CheckpointNotFound: The owner has no checkpoint of that name.
            DataLoss: A file is missing, or its record is damaged.
            StoreFailed: The store's folder was replaced.
        """
        with self._lock:
            entry = self._entry(owner, name)
            entry.pins += 1
            self._blobs.acquire(entry.files())
        record = entry.record
        try:
            self._last_uses.touch(entry)
            files = self.open_files(record.name, record.files)
            masks = self._blobs.open(record.name, record.masks) if record.masks else None
            yield OpenCheckpoint(record, files, masks)
        finally:
            with self._lock:
                entry.pins -= 1
                unused = self._blobs.release(entry.files())
            self._last_uses.touch(entry)  # a call may take longer than the ttl
            self._blobs.remove(Trash(blobs=unused))

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that the caller has uploaded. `name` is the checkpoint's, for errors.

        Raises:
            DataLoss: A file is missing.
            StoreFailed: The store's folder was replaced.
        """
        return [self._blobs.open(name, file) for file in files]

    def create(
        self,
        context: RequestContext,
        owner: str,
        files: tuple[StoredFile, ...],
        masks: StoredFile | None = None,
        quota: int | None = None,
    ) -> Record:
        """Creates a checkpoint of uploaded files. It is synced to disk when this returns.

        Args:
            context: The request, which may end while files are sent to an object store.
            owner: The owner of the checkpoint.
            files: The weights.
            masks: A file of masks, if the server has pruned the checkpoint.
            quota: Bytes that the owner may have; None: no limit.

        Raises:
            StoreFull, QuotaExceeded: The record does not fit.
            StoreFailed: The disk failed.
        """
        record = new_record(files, masks)
        self.add(owner, record, quota)
        return record

    def add(self, owner: str, record: Record, quota: int | None = None) -> None:
        """Adds a checkpoint of uploaded files. It is synced to disk when this returns.

        Args:
            owner: The owner of the checkpoint.
            record: Of the checkpoint.
            quota: Bytes that the owner may have; None: no limit.

        Raises:
            StoreFull, QuotaExceeded: The record does not fit.
            StoreFailed: The disk failed.
        """
        self._folder_lock.check()
        entry = Entry(owner, record, self._clock.now())
        path = record_path(self._records / owner, entry.record.id)
        with self._lock:
            count = self._accounts.record_bytes(entry)
            trash = self._space.make_way(owner, count, quota)
            self._removal.count(entry)
            account = self._accounts.get(owner)
        try:
            self._space.remove(trash)
            self._make_folder(path.parent, account)
            write_record(path.parent, entry.record)
        except BaseException:
            self._undo(entry, is_written=path.exists())
            raise
        self._last_uses.write(entry)
        with self._lock:
            account.add(entry)

    def _make_folder(self, folder: Path, account: Account) -> None:
        """Creates the folder of an owner, and syncs its name."""
        if not account.is_folder_synced:
            with disk_errors():
                folder.mkdir(mode=0o700, exist_ok=True)
                sync_folder(folder.parent)
            account.is_folder_synced = True

    def _undo(self, entry: Entry, is_written: bool) -> None:
        """Removes a checkpoint that could not be created.

        If the record was written, only its sync failed. The checkpoint exists if the disk does not
        remove the record either.
        """
        trash = Trash(entries=[entry] if is_written else [])
        with self._lock:
            self._removal.forget(entry, trash)
        self._removal.finish(trash)
        self._removal.remove_folder(entry.owner)

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint, which may be damaged: all of it, or nothing.

        Raises:
            CheckpointNotFound: The owner has no checkpoint of that name.
            StoreFailed, StoreFull: The disk did not remove its record.
        """
        try:
            self._delete(owner, name)
        except (StoreFailed, StoreFull) as error:
            what = f"{quote(name)} was not deleted: {error.description}"
            raise type(error)("name", what) from None

    def _delete(self, owner: str, name: str) -> None:
        self._folder_lock.check()
        trash = Trash()
        try:
            with self._lock:
                self._removal.drop(self._entry(owner, name), trash)
        except DataLoss:  # its blobs are unknown; the next start removes them
            ident = name.removeprefix(PREFIX)
            self._removal.remove_unreadable(owner, ident)
            self._unreadable.discard((owner, ident))
        else:
            self._removal.finish(trash)

    def _expire(self) -> None:
        while not self._is_closed.wait(EXPIRE_SECONDS):
            try:
                self.expire()
            except (RequestError, OSError) as error:  # the disk may work again later
                log.error("cannot remove expired checkpoints: %s", error)

    def expire(self) -> None:
        """Removes checkpoints that have not been used for `ttl` seconds, and old uploads.

        Raises:
            StoreFailed, StoreFull: The disk did not remove the records of some checkpoints.
        """
        self._folder_lock.check()
        self._last_uses.follow_clock()
        self.uploads.expire()
        with self._lock:
            oldest = self._clock.now() - self.ttl if self.ttl else -math.inf
            old = [
                (entry, "ttl")
                for account in self._accounts.by_owner.values()
                for entry in takewhile(lambda e: e.used < oldest, account.entries.values())
                if not entry.pins
            ]
            trash = self._space.evict(old)
        self._space.remove(trash)

    def check_size(self, size: int) -> None:
        """Refuses `size` bytes if they would never fit.

        Raises:
            StoreFull: They are more than the store's limit.
        """
        if size > self.max_bytes:
            raise StoreFull(
                "data", f"{size} bytes are more than the store's limit of {self.max_bytes}"
            )
