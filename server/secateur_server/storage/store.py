"""The checkpoints of all callers, on one folder, within a number of bytes.

checkpoints/OWNER/ID.json   records: written last, so that what they name is there
blobs/DIGEST, .sums         files, each once, whoever has stored it
parts/                      unfinished; swept at start
"""

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    RequestError,
    StoreFailed,
    StoreFull,
    TakenOver,
    quote,
)
from secateur_server.runtime.disk import disk_errors, sync_folder
from secateur_server.storage.accounts import Accounts, Entry, Evictable, Upload
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.blobs import Blob
from secateur_server.storage.clock import Clock
from secateur_server.storage.eviction import EvictionPolicy, Victim
from secateur_server.storage.folders import FolderLock
from secateur_server.storage.records import (
    PREFIX,
    Record,
    StoredFile,
    new_record,
    read_records,
    record_path,
    write_record,
)
from secateur_server.storage.removal import Removal
from secateur_server.storage.uploads import Uploads

log = logging.getLogger(__name__)

# How often what is too old is looked for.
EXPIRE_SECONDS = 10.0

Key = tuple[str, str]  # an owner, and an id or a digest


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint in use.  files: in the record's order, without the masks."""

    record: Record
    files: list[Blob]
    masks: Blob | None


@dataclass
class Evicted:
    """What was taken out of the index to make room.

    Attributes:
        checkpoints: Each, why it was evicted, and the bytes that this frees.
    """

    checkpoints: list[tuple[Entry, str, int]] = field(default_factory=list)
    trash: Trash = field(default_factory=Trash)


class Store:
    """The checkpoints of all callers.  Errors of its making: StoreInUse.

    max_bytes: of everything on its disk.  ttl: seconds that a checkpoint is kept from its last use;
    0 is for ever.  evicted: is called with the reason and the bytes of what had to go.
    is_temporary: the folder goes when the store is closed.
    scratch: a folder for files of calls, which is swept at start.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        ttl: float,
        evicted: Callable[[str, int], None] = lambda reason, count: None,
        is_temporary: bool = False,
    ) -> None:
        self.ttl = ttl
        self._evicted = evicted
        self._folder = folder
        self._is_temporary = is_temporary
        self.scratch = folder / "parts"
        self._clock = Clock()
        self._lock = threading.Condition(threading.RLock())
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder_lock = FolderLock(folder)
        self._blobs = BlobFolder(folder / "blobs", self._lock, self._folder_lock.check)
        self._accounts = Accounts()
        records = folder / "checkpoints"
        self._removal = Removal(records, self._blobs, self._accounts, self._folder_lock, self._lock)
        self._policy = EvictionPolicy(max_bytes, self._accounts, self._blobs.references)
        self.uploads = Uploads(
            *(self._blobs, self._accounts, self._policy),
            self.scratch,
            self._lock,
            self._clock,
            self._reserve_part,
        )
        self._unreadable: set[Key] = set()  # records that differ from what was written
        self._owner_folders: set[Path] = set()  # which exist after a crash
        try:
            for path in (self._blobs.folder, self.scratch, folder / "checkpoints"):
                path.mkdir(exist_ok=True, mode=0o700)
            self._load()
        except BaseException:
            self._folder_lock.close()
            raise
        self._is_closed = threading.Event()
        self._expiring = threading.Thread(target=self._expire, name="expire", daemon=True)
        self._expiring.start()

    def _load(self) -> None:
        """Reads the records, and sweeps what was not finished."""
        checkpoints = self._folder / "checkpoints"
        self._owner_folders = {folder for folder in checkpoints.iterdir() if folder.is_dir()}
        records: list[tuple[float, str, Record]] = []
        unfinished = list(self.scratch.iterdir())
        for folder in self._owner_folders:
            found = read_records(folder)
            records += [(used, folder.name, record) for record, used in found.records]
            self._unreadable |= {(folder.name, ident) for ident in found.unreadable}
            unfinished += found.unfinished
        # A server before may have been killed ahead of its sync: what is seen now is to stay.
        folders = (self._folder.parent, self._folder, self._blobs.folder, checkpoints)
        for folder in (*folders, *self._owner_folders):
            sync_folder(folder)
        now = self._clock.wall(self._clock.now())
        for used, owner, record in sorted(records, key=lambda each: each[0]):
            entry = Entry(owner, record, self._clock.moment(used))
            self._add(entry)
            if used > now:  # the system's clock was set back
                self._write_use(entry)
        if not self._unreadable:  # what those need is unknown
            unfinished += self._blobs.unknown()
        count = sum(path.stat().st_size for path in unfinished)
        for path in unfinished:
            path.unlink()
        log.info(
            "store %s: %d checkpoints, %d bytes; swept %d unfinished files of %d bytes",
            *(self._folder, len(records), self.used_bytes, len(unfinished), count),
        )

    def _add(self, entry: Entry) -> None:
        self._removal.count(entry)
        self._accounts.opened(entry.owner).add(entry)

    def close(self) -> None:
        """Gives the folder to whoever wants it next."""
        self._is_closed.set()
        self._expiring.join()
        self.uploads.close()
        if self._is_temporary and self._folder_lock.is_in_place:
            shutil.rmtree(self._folder, ignore_errors=True)  # a cleaner of /tmp may be first
        self._folder_lock.close()

    @property
    def max_bytes(self) -> int:
        """Bytes that everything on its disk may take."""
        return self._policy.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those of parts that are about to be written."""
        with self._lock:
            return self._policy.used_bytes + self._blobs.removing_bytes

    @property
    def count(self) -> int:
        """How many checkpoints there are."""
        with self._lock:
            return sum(len(account.entries) for account in self._accounts.by_owner.values())

    def get(self, owner: str, name: str) -> Record:
        """The record of a checkpoint.  Errors: CheckpointNotFound, DataLoss."""
        with self._lock:
            return self._entry(owner, name).record

    def expire_time(self, owner: str, record: Record) -> float | None:
        """When a checkpoint goes, in seconds since 1970; None is never."""
        with self._lock:
            entry = self._accounts.get(owner).entries.get(record.id)
        return self._clock.wall(entry.used + self.ttl) if self.ttl and entry else None

    def page(self, owner: str, before: str, most: int) -> Sequence[Record]:
        """Up to `most` checkpoints, the newest first.  before: those older than this id."""
        with self._lock:
            return self._accounts.get(owner).page(before, most)

    def _entry(self, owner: str, name: str) -> Entry:
        """Errors: CheckpointNotFound, DataLoss."""
        ident = name.removeprefix(PREFIX)
        if name.startswith(PREFIX):
            if entry := self._accounts.get(owner).entries.get(ident):
                return entry
            if (owner, ident) in self._unreadable:
                raise DataLoss(name, "is not what was stored: its record differs")
        raise CheckpointNotFound(
            "checkpoint",
            f"there is no {quote(name)}: it may have been deleted, evicted or expired, or belong "
            "to another token",
        )

    @contextmanager
    def open(self, owner: str, name: str) -> Iterator[OpenCheckpoint]:
        """Opens a checkpoint, which is neither evicted nor lost while the block runs.

        Errors: CheckpointNotFound, DataLoss, StoreFailed.
        """
        with self._lock:
            entry = self._entry(owner, name)
            entry.pins += 1
            self._blobs.acquire(entry.files())
        record = entry.record
        try:
            self._touch(entry)
            files = self.open_files(record.name, record.files)
            masks = self._blobs.open(record.name, record.masks) if record.masks else None
            yield OpenCheckpoint(record, files, masks)
        finally:
            with self._lock:
                entry.pins -= 1
                unused = self._blobs.release(entry.files())
            self._touch(entry)  # a call may take longer than the ttl
            self._blobs.remove(Trash(blobs=unused))

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that an upload of the caller holds.  Errors: DataLoss, StoreFailed."""
        return [self._blobs.open(name, file) for file in files]

    def _touch(self, entry: Entry) -> None:
        now = self._clock.now()
        with self._lock:
            account = self._accounts.get(entry.owner)
            if entry.record.id not in account.entries:
                return
            account.touch(entry, now)
        self._write_use(entry)

    def _write_use(self, entry: Entry) -> None:
        """Keeps the time of the last use for the next start."""
        used = self._clock.wall(entry.used)
        with suppress(OSError):  # of a full disk, or a record that somebody took away
            # The system's own clock is coarser.
            os.utime(self._record_path(entry.owner, entry.record.id), (used, used))

    def _record_path(self, owner: str, ident: str) -> Path:
        return record_path(self._folder / "checkpoints" / owner, ident)

    def create(
        self,
        owner: str,
        files: tuple[StoredFile, ...],
        masks: StoredFile | None = None,
        quota: int | None = None,
    ) -> Record:
        """Makes a checkpoint of files that are here. It is on disk when this returns.

        quota: bytes that the owner may have here; None is no bound.
        Errors: StoreFull, StoreFailed, QuotaExceeded.
        """
        self._folder_lock.check()
        entry = Entry(owner, new_record(files, masks), self._clock.now())
        path = self._record_path(owner, entry.record.id)
        with self._lock:
            evicted = self._make_room(owner, entry.own_bytes, quota)
            self._blobs.acquire(entry.files())
            self._accounts.acquire(owner, entry.files())
        try:
            self._remove(evicted)
            self._make_folder(path.parent)
            write_record(path.parent, entry.record)
        except BaseException:
            self._undo(entry, is_written=path.exists())
            raise
        self._write_use(entry)
        with self._lock:
            self._accounts.opened(owner).add(entry)
        return entry.record

    def _make_folder(self, folder: Path) -> None:
        """A folder of an owner, which exists after a crash.  Errors: StoreFull."""
        if folder not in self._owner_folders:
            with disk_errors():
                folder.mkdir(mode=0o700, exist_ok=True)
                sync_folder(folder.parent)
            self._owner_folders.add(folder)

    def _undo(self, entry: Entry, is_written: bool) -> None:
        """Leaves nothing of a checkpoint that could not be created.

        is_written: whether its record was, and only the sync failed. If the disk does not remove
        it either, the checkpoint exists.
        """
        trash = Trash(entries=[entry] if is_written else [])
        with self._lock:
            self._removal.forget(entry, trash)
        self._removal.finish(trash)

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint, and what is left of a damaged one: all of it, or nothing.

        Raises:
            CheckpointNotFound: It does not exist.
            StoreFailed, StoreFull: The disk does not remove its record.
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
        except DataLoss:  # what it needed is unknown, and swept at the next start
            ident = name.removeprefix(PREFIX)
            self._removal.remove_unreadable(owner, ident)
            self._unreadable.discard((owner, ident))
        else:
            self._removal.finish(trash)

    def _drop(self, holding: Evictable, trash: Trash) -> int:
        """Takes something out of the index. Its files go to `trash`.

        Returns:
            The bytes that this frees on disk.
        """
        before = self._policy.used_bytes
        if isinstance(holding, Upload):
            self.uploads.drop(holding, trash)
        else:
            self._removal.drop(holding, trash)
        return before - self._policy.used_bytes

    def _expire(self) -> None:
        while not self._is_closed.wait(EXPIRE_SECONDS):
            try:
                self.expire()
            except (RequestError, OSError) as error:  # the disk may serve again
                log.error("checkpoints do not expire: %s", error)

    def expire(self) -> None:
        """Lets go what nobody has used for too long.  Errors: StoreFailed, StoreFull."""
        self._folder_lock.check()
        self._follow_clock()
        self.uploads.expire()
        with self._lock:
            oldest = self._clock.now() - self.ttl if self.ttl else -math.inf
            old: list[Victim] = [
                (entry, "ttl")
                for account in self._accounts.by_owner.values()
                for entry in takewhile(lambda e: e.used < oldest, account.entries.values())
                if not entry.pins
            ]
            evicted = self._evict(old)
        self._remove(evicted)

    def _follow_clock(self) -> None:
        """Where the system's clock was set, writes the times of last uses by the new one."""
        step = self._clock.follow()
        if not step:
            return
        log.warning("the system's clock was set by %+.0f seconds: no age has changed", step)
        with self._lock:
            accounts = self._accounts.by_owner.values()
            entries = [entry for account in accounts for entry in account.entries.values()]
        for entry in entries:
            self._write_use(entry)

    def check_size(self, size: int) -> None:
        """Errors: StoreFull, where `size` bytes never fit."""
        if size > self._policy.max_bytes:
            raise StoreFull(
                "data", f"{size} bytes are more than the store's {self._policy.max_bytes}"
            )

    def _reserve_part(self, upload: Upload, size: int) -> None:
        """Makes room for the part of an upload to take `size` bytes on disk.

        Errors: StoreFull, StoreFailed, QuotaExceeded, TakenOver.
        """
        self._folder_lock.check()
        part = upload.part
        with self._lock:
            if part is None or upload not in self._accounts.get(upload.owner).uploads:
                raise TakenOver("header", "another call of the same caller sends this file")
            count = size - part.reserved
            evicted = self._make_room(upload.owner, count, upload.quota)
            part.reserved = size
        try:
            self._remove(evicted)
        except BaseException:
            with self._lock:  # where the upload was dropped meanwhile, nothing is reserved
                self._accounts.reserve(upload.owner, part, -min(count, part.reserved))
            raise

    def _make_room(self, owner: str, count: int, quota: int | None) -> Evicted:
        """Counts `count` bytes more of an owner's, and evicts what must make room for them.

        The caller has the lock, and must pass what is returned to `_remove`.
        quota: of the owner, of whom enough goes first; None is no bound.
        Errors: StoreFull, QuotaExceeded: then nothing goes.
        """
        evicted = self._evict(self._policy.victims(owner, count, quota))
        self._accounts.count(owner, count)
        return evicted

    def _evict(self, victims: Iterable[Victim]) -> Evicted:
        """Takes victims out of the index. The caller has the lock."""
        evicted = Evicted()
        for victim, reason in victims:
            freed = self._drop(victim, evicted.trash)
            if isinstance(victim, Entry):
                evicted.checkpoints.append((victim, reason, freed))
        return evicted

    def _remove(self, evicted: Evicted) -> None:
        """Removes what was evicted from the disk. The caller does not have the lock.

        Errors: StoreFailed, StoreFull.
        """
        try:
            self._removal.finish(evicted.trash)
        finally:
            removed = set(evicted.trash.entries)
            for entry, reason, freed in evicted.checkpoints:
                if entry in removed:
                    log.info("evicted %s (%s): %d bytes", entry.record.name, reason, freed)
                    self._evicted(reason, freed)
        with self._lock:  # what other calls remove may still be on disk
            self._lock.wait_for(
                lambda: not self._blobs.removing_bytes or self.used_bytes <= self._policy.max_bytes
            )
