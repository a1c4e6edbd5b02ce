"""The index of the store: what each owner has, so that a call reads its own owner's data only."""

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Condition, Lock, RLock

from secateur_server.runtime.disk import DISK_BLOCK
from secateur_server.storage.records import Record, StoredFile
from secateur_server.storage.references import References
from secateur_server.storage.staged_file import StagedFile


@dataclass(eq=False)
class Entry:
    """A checkpoint in the index.

    Attributes:
        owner: The owner of the checkpoint.
        record: Its record on disk.
        used: The moment of its last use, by the store's clock.
        pins: The number of calls that are using it.
    """

    owner: str
    record: Record
    used: float
    pins: int = 0

    @property
    def own_bytes(self) -> int:
        """Bytes that its record takes on disk."""
        return self.record.disk_bytes

    def files(self) -> list[StoredFile]:
        """The files that it refers to."""
        return self.record.blobs()


@dataclass(eq=False)
class Upload:
    """A file that a caller is uploading, or has uploaded before creating a checkpoint.

    Attributes:
        owner: The owner of the file.
        size: Bytes, as announced.
        digest: Hex BLAKE3; None: not known before the file is complete.
        staged: The file that is being received; None: it is complete, and a blob.
        position: The offset in the file of the next byte that the call sends.
        is_resumable: Whether it is kept when its call breaks.
        quota: Bytes that the owner may have; None: no limit.
        used: The moment of the last received byte, by the store's clock.
        is_active: Whether a call is sending it.
        is_taken_over: Whether a newer call has taken it over.
        is_finishing: Whether it is being made a blob.
        writing: Held while the staged file is written.
    """

    owner: str
    size: int
    digest: str | None
    staged: StagedFile | None
    position: int
    is_resumable: bool
    quota: int | None
    used: float
    is_active: bool = True
    is_taken_over: bool = False
    is_finishing: bool = False
    writing: Lock = field(default_factory=Lock)

    @property
    def received(self) -> int:
        """Bytes of the file that the store has."""
        return self.staged.size if self.staged else self.size

    @property
    def own_bytes(self) -> int:
        """Bytes that its staged file may take on disk."""
        return self.staged.reserved if self.staged else 0

    def files(self) -> list[StoredFile]:
        """The file that it refers to, once it is complete."""
        return [] if self.staged else [StoredFile("", self.size, self.digest or "")]


Evictable = Entry | Upload


class Account:
    """The checkpoints and uploads of one owner. The store's lock guards it.

    Attributes:
        entries: Checkpoints by id, the least recently used first.
        ids: Ids of the checkpoints, the oldest first.
        uploads: The uploads, in the order in which they began.
        unfinished: Uploads that a later call may resume, by digest and size.
        references: The references to the files of all checkpoints and uploads.
        records: The number of records, including those that are about to be written or removed.
        is_folder_synced: Whether the folder of the records exists, even after a crash.
        own_bytes: Bytes of records, their folder, and staged files.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.ids: list[str] = []
        self.uploads: dict[Upload, None] = {}
        self.unfinished: dict[tuple[str | None, int], Upload] = {}
        self.references = References()
        self.records = self.own_bytes = 0
        self.is_folder_synced = False

    @property
    def bytes(self) -> int:
        """Bytes on disk. A file counts once, however many checkpoints refer to it."""
        return self.own_bytes + self.references.bytes

    def add(self, entry: Entry) -> None:
        """Adds a checkpoint, as the most recently used."""
        self.entries[entry.record.id] = entry
        insort(self.ids, entry.record.id)

    def remove(self, entry: Entry) -> None:
        """Removes a checkpoint."""
        del self.entries[entry.record.id]
        del self.ids[bisect_left(self.ids, entry.record.id)]

    def restore(self, entries: Iterable[Entry]) -> None:
        """Adds checkpoints again, in the order of their last uses."""
        for entry in entries:
            self.add(entry)
        self.entries = OrderedDict(sorted(self.entries.items(), key=lambda each: each[1].used))

    def touch(self, entry: Entry, now: float) -> None:
        """Records that a checkpoint is used."""
        entry.used = now
        self.entries.move_to_end(entry.record.id)

    def page(self, before: str, most: int) -> list[Record]:
        """Up to `most` checkpoints older than the id `before`, if it is not empty; newest first."""
        end = bisect_left(self.ids, before) if before else len(self.ids)
        return [self.entries[each].record for each in reversed(self.ids[max(0, end - most) : end])]

    def idle(self) -> Iterator[Evictable]:
        """Checkpoints and uploads that no call uses, the least recently used first."""
        entries = (entry for entry in self.entries.values() if not entry.pins)
        uploads = sorted((u for u in self.uploads if not u.is_active), key=lambda u: u.used)
        return heapq.merge(entries, uploads, key=lambda item: item.used)


class Accounts:
    """The accounts of all owners.

    Attributes:
        lock: The store's lock. It guards this object and the reference counts of blobs.
        by_owner: Accounts that are not empty.
        own_bytes: Bytes of all records, their folders, and staged files.
    """

    def __init__(self) -> None:
        self.lock = Condition(RLock())
        self.by_owner: dict[str, Account] = {}
        self.own_bytes = 0

    def get(self, owner: str) -> Account:
        """An owner's account, or an empty one that is not stored."""
        return self.by_owner.get(owner) or Account(owner)

    def get_or_create(self, owner: str) -> Account:
        """An owner's account, which is created if it does not exist."""
        return self.by_owner.setdefault(owner, Account(owner))

    def reserve(self, owner: str, staged: StagedFile, count: int) -> None:
        """Counts `count` more bytes of a staged file."""
        staged.reserved += count
        self._count(owner, count)

    def record_bytes(self, entry: Entry) -> int:
        """Bytes that one more record takes on disk. The first one of an owner needs a folder."""
        return entry.own_bytes + (0 if self.get(entry.owner).records else DISK_BLOCK)

    def count_record(self, entry: Entry) -> None:
        """Counts the bytes of a record."""
        count = self.record_bytes(entry)
        self.get_or_create(entry.owner).records += 1
        self._count(entry.owner, count)

    def forget_record(self, entry: Entry) -> None:
        """Reverses `count_record`."""
        self.by_owner[entry.owner].records -= 1
        self._count(entry.owner, -self.record_bytes(entry))

    def _count(self, owner: str, count: int) -> None:
        account = self.get_or_create(owner)
        account.own_bytes += count
        self.own_bytes += count
        self._remove_if_empty(account)

    def acquire(self, owner: str, files: list[StoredFile]) -> None:
        """Adds references to files."""
        self.get_or_create(owner).references.acquire(files)

    def release(self, owner: str, files: list[StoredFile]) -> None:
        """Removes references to files."""
        account = self.by_owner[owner]
        account.references.release(files)
        self._remove_if_empty(account)

    def add(self, upload: Upload) -> None:
        """Adds an upload."""
        account = self.get_or_create(upload.owner)
        account.uploads[upload] = None
        if upload.staged and upload.is_resumable:
            account.unfinished[upload.digest, upload.size] = upload

    def discard(self, upload: Upload) -> bool:
        """Removes an upload. Returns whether it existed."""
        account = self.get(upload.owner)
        if upload not in account.uploads:
            return False
        del account.uploads[upload]
        self.finished(upload)
        self._remove_if_empty(account)
        return True

    def finished(self, upload: Upload) -> None:
        """Records that an upload cannot be resumed any more."""
        unfinished = self.get(upload.owner).unfinished
        if unfinished.get((upload.digest, upload.size)) is upload:
            del unfinished[upload.digest, upload.size]

    def _remove_if_empty(self, account: Account) -> None:
        is_used = account.entries or account.uploads or account.references or account.own_bytes
        if not is_used:
            self.by_owner.pop(account.owner, None)
