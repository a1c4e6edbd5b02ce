"""What each owner holds: an index, so that no call looks at what other owners have."""

import heapq
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from secateur_server.storage.blobs import StagedFile
from secateur_server.storage.records import Record, StoredFile
from secateur_server.storage.references import References


@dataclass(eq=False)
class Entry:
    """A checkpoint.

    Attributes:
        used: The moment of its last use, by the store's clock.
        pins: Calls that use it now.
    """

    owner: str
    record: Record
    used: float
    pins: int = 0

    @property
    def own_bytes(self) -> int:
        """What its record takes on disk."""
        return self.record.disk_bytes

    def files(self) -> list[StoredFile]:
        """The files that it uses."""
        return self.record.blobs()


@dataclass(eq=False)
class Upload:
    """A file that a caller sends, or has sent and not made a checkpoint of.

    Attributes:
        size: As announced.
        part: Until the file is whole.
        at: Where in the file the call's next byte is.
        is_resumable: Whether it outlasts the call.
        quota: Bytes that the owner may hold; None is no bound.
        used: The moment at which the last byte came, by the store's clock.
        is_active: Whether a call sends it now.
        is_stale: Whether a newer call has taken it over.
        is_finishing: Whether it becomes a blob.
        writing: Held while its part is written.
    """

    owner: str
    size: int
    digest: str | None
    part: StagedFile | None
    at: int
    is_resumable: bool
    quota: int | None
    used: float
    is_active: bool = True
    is_stale: bool = False
    is_finishing: bool = False
    writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def held(self) -> int:
        """Bytes that the store has."""
        return self.part.size if self.part else self.size

    @property
    def own_bytes(self) -> int:
        """What its part may take on disk."""
        return self.part.reserved if self.part else 0

    def files(self) -> list[StoredFile]:
        """The file that it uses, once it is whole."""
        return [] if self.part else [StoredFile("", self.size, self.digest or "")]


Evictable = Entry | Upload


class Account:
    """What one owner holds. The store's lock guards it.

    Attributes:
        entries: Checkpoints by id, the least recently used first.
        ids: Ids of the checkpoints, the oldest first.
        uploads: In the order of their beginning.
        unfinished: Uploads that a later call may resume, by digest and size.
        references: Of the files of all of these.
        own_bytes: Of records and parts.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.ids: list[str] = []
        self.uploads: dict[Upload, None] = {}
        self.unfinished: dict[tuple[str | None, int], Upload] = {}
        self.references = References()
        self.own_bytes = 0

    @property
    def bytes(self) -> int:
        """What it takes on disk: each file once, however many checkpoints use it."""
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
        """Adds checkpoints again, at the places that their last uses give them."""
        for entry in entries:
            self.add(entry)
        self.entries = OrderedDict(sorted(self.entries.items(), key=lambda each: each[1].used))

    def touch(self, entry: Entry, now: float) -> None:
        """A checkpoint is used."""
        entry.used = now
        self.entries.move_to_end(entry.record.id)

    def page(self, before: str, most: int) -> list[Record]:
        """Up to `most` checkpoints, the newest first; only those older than the id `before`."""
        end = bisect_left(self.ids, before) if before else len(self.ids)
        return [self.entries[each].record for each in reversed(self.ids[max(0, end - most) : end])]

    def idle(self) -> Iterator[Evictable]:
        """What no call uses, the least recently used first."""
        entries = (entry for entry in self.entries.values() if not entry.pins)
        uploads = sorted((u for u in self.uploads if not u.is_active), key=lambda u: u.used)
        return heapq.merge(entries, uploads, key=lambda holding: holding.used)


class Accounts:
    """The accounts of all owners who hold something. The store's lock guards it.

    Attributes:
        own_bytes: Of all records and parts.
    """

    def __init__(self) -> None:
        self.by_owner: dict[str, Account] = {}
        self.own_bytes = 0

    def get(self, owner: str) -> Account:
        """An owner's account, or an empty one that is not kept."""
        return self.by_owner.get(owner) or Account(owner)

    def opened(self, owner: str) -> Account:
        """An owner's account, to which something is about to be added."""
        return self.by_owner.setdefault(owner, Account(owner))

    def reserve(self, owner: str, part: StagedFile, count: int) -> None:
        """Counts bytes of a part."""
        part.reserved += count
        self.count(owner, count)

    def count(self, owner: str, count: int) -> None:
        """Counts bytes of a record or a part."""
        account = self.opened(owner)
        account.own_bytes += count
        self.own_bytes += count
        self._tidy(account)

    def acquire(self, owner: str, files: list[StoredFile]) -> None:
        """Counts files."""
        self.opened(owner).references.acquire(files)

    def release(self, owner: str, files: list[StoredFile]) -> None:
        """Takes back `acquire`."""
        account = self.by_owner[owner]
        account.references.release(files)
        self._tidy(account)

    def remove(self, entry: Entry) -> None:
        """Removes a checkpoint."""
        account = self.by_owner[entry.owner]
        account.remove(entry)
        self._tidy(account)

    def add(self, upload: Upload) -> None:
        """Adds an upload."""
        account = self.opened(upload.owner)
        account.uploads[upload] = None
        if upload.part and upload.is_resumable:
            account.unfinished[upload.digest, upload.size] = upload

    def discard(self, upload: Upload) -> bool:
        """Removes an upload.

        Returns:
            Whether it existed.
        """
        account = self.get(upload.owner)
        if upload not in account.uploads:
            return False
        del account.uploads[upload]
        self.finished(upload)
        self._tidy(account)
        return True

    def finished(self, upload: Upload) -> None:
        """An upload is not to be resumed."""
        unfinished = self.get(upload.owner).unfinished
        if unfinished.get((upload.digest, upload.size)) is upload:
            del unfinished[upload.digest, upload.size]

    def _tidy(self, account: Account) -> None:
        held = account.entries or account.uploads or account.references or account.own_bytes
        if not held:
            self.by_owner.pop(account.owner, None)
