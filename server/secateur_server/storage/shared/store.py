"""A store of checkpoints that several servers share."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    InvalidStateDict,
    RequestError,
    StoreFailed,
    StoreFull,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.accounts import Entry
from secateur_server.storage.blobs import Blob
from secateur_server.storage.receiver import Receiver
from secateur_server.storage.records import PREFIX, Record, StoredFile, new_record
from secateur_server.storage.shared.claims import LEASE_SECONDS, Claim, claimed, remove_unnamed
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.records import SharedRecords, record_key
from secateur_server.storage.shared.usage import Usage, read_usage, used_key
from secateur_server.storage.store import OpenCheckpoint, Store
from secateur_server.storage.uploads import Uploads

log = logging.getLogger(__name__)

# Seconds between searches for expired checkpoints, which also measure the store; and for objects
# that servers have left behind.
EXPIRE_SECONDS, SWEEP_SECONDS = 60.0, 3600.0
# Seconds between notes of the use of a checkpoint.
USE_SECONDS = 60.0
# Seconds between checks for cancellation.
WAIT_SECONDS = 0.2
# How often a checkpoint is fetched that the local disk has lost before it was opened.
ATTEMPTS = 3


class SharedStore:
    """The checkpoints of all callers, in an object store.

    Args:
        objects: The object store.
        local: Has the uploads to this server, and is a cache of checkpoints.
        max_bytes: The limit of all checkpoints.
        ttl: Seconds from its last use that a checkpoint is kept; 0: for ever.
        evicted: Called with the reason of each eviction and the bytes that it freed.

    Attributes:
        used_bytes: Bytes of all checkpoints, as they were a while ago.
        count: The number of checkpoints, as it was a while ago.

    Raises:
        StoreFailed: The object store cannot be written to and read.
    """

    used_bytes: int
    count: int

    def __init__(
        self,
        objects: Objects,
        local: Store,
        max_bytes: float,
        ttl: float,
        evicted: Callable[[str, int], None] = lambda reason, count: None,
    ) -> None:
        self.max_bytes, self.ttl = max_bytes, ttl
        self._objects, self._local, self._evicted = objects, local, evicted
        self._records = SharedRecords(objects)
        self._uses: dict[str, float] = {}
        self._damaged: set[str] = set()
        self._fetching = WeakValueDictionary[str, threading.Lock]()
        self._check()
        self._measure(self._read_usage(RequestContext()))
        self._is_closed = threading.Event()
        self._expiring = threading.Thread(target=self._expire, name="expire", daemon=True)
        self._expiring.start()

    def _check(self) -> None:
        context, key = RequestContext(), f"claims/start/{new_record((), None).id}"
        self._objects.write(context, key)
        if self._objects.find(context, key) is None:
            raise StoreFailed("store", "the object store does not show what was written to it")
        self._objects.remove(context, key)

    def close(self) -> None:
        """Stops all background work."""
        self._is_closed.set()
        self._expiring.join()
        self._local.close()

    @property
    def uploads(self) -> Uploads:
        """The uploads to this server."""
        return self._local.uploads

    @property
    def scratch(self) -> Path:
        """A folder on the local disk."""
        return self._local.scratch

    @property
    def disk_limit(self) -> int:
        """Bytes that the cache, with uploads, may have on the local disk."""
        return self._local.disk_limit

    def get(self, owner: str, name: str) -> Record:
        """Returns the record of a checkpoint, as Store.get does."""
        return self._records.get(RequestContext(), owner, name)

    def expire_time(self, owner: str, record: Record) -> float | None:
        """Returns when a checkpoint expires, by uses that are known here; None: never."""
        if not self.ttl:
            return None
        return self._used.get(used_key(owner, record), record.create_time / 1e9) + self.ttl

    def page(self, owner: str, before: str, most: int) -> Sequence[Record]:
        """Returns a page of checkpoints, as Store.page does."""
        context = RequestContext()
        idents = self._records.idents(context, owner)
        older = [ident for ident in reversed(idents) if not before or ident < before]
        return self._records.some(context, owner, older[:most])

    @contextmanager
    def open(self, context: RequestContext, owner: str, name: str) -> Iterator[OpenCheckpoint]:
        """Opens a checkpoint for a block, as Store.open does. Fetches the files that are not here.

        Raises:
            CheckpointNotFound, DataLoss, StoreFailed: As of Store.open, and of the object store.
            StoreFull: The local disk has no space for the files.
        """
        record = self._records.get(context, owner, name)
        self._note_use(owner, record)
        with ExitStack() as stack:
            yield self._opened(context, owner, record, stack)
        self._note_use(owner, record)  # a call may take longer than the ttl

    def _opened(
        self, context: RequestContext, owner: str, record: Record, stack: ExitStack
    ) -> OpenCheckpoint:
        for attempt in range(ATTEMPTS):
            with self._alone(context, record):
                self._fetch(context, owner, record)
            try:
                return stack.enter_context(self._local.open(context, owner, record.name))
            except (CheckpointNotFound, DataLoss):  # evicted from the cache, or damaged there
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    @contextmanager
    def _alone(self, context: RequestContext, record: Record) -> Iterator[None]:
        """Lets one call at a time fetch a checkpoint; the others then find its files here."""
        lock = self._fetching.setdefault(record.id, threading.Lock())
        while not lock.acquire(timeout=WAIT_SECONDS):
            context.check()
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, context: RequestContext, owner: str, record: Record) -> None:
        """Fetches the files of a checkpoint that are not on the local disk."""
        if self._local.has(owner, record):
            return
        context.begin("fetch", sum(file.size for file in record.blobs()))
        with Receiver(context, self._local, owner) as receiver:
            for file in record.blobs():
                parts = self._objects.download(context, f"blobs/{file.blake3}")
                try:
                    receiver.receive(file.filename, file.size, parts, file.blake3)
                except FileNotFoundError:
                    self._records.get(context, owner, record.name)  # it may be evicted by now
                    raise _lost(record, file, "is missing") from None
                except InvalidStateDict:
                    self._damaged.add(file.blake3)  # an upload of the file repairs it
                    raise _lost(record, file, "is damaged") from None
            with suppress(CheckpointNotFound):
                self._local.get(owner, record.name)
                return
            self._local.add(owner, record)
            receiver.abandon()

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that a caller has uploaded to this server."""
        return self._local.open_files(name, files)

    def create(
        self,
        context: RequestContext,
        owner: str,
        files: tuple[StoredFile, ...],
        masks: StoredFile | None = None,
        quota: int | None = None,
    ) -> Record:
        """Creates a checkpoint of files on the local disk, as Store.create does.

        Raises:
            StoreFull, QuotaExceeded: It does not fit, or would not with others that are new.
            StoreFailed: The object store failed.
        """
        record = new_record(files, masks)
        digests = [file.blake3 for file in record.blobs()]
        try:
            with claimed(context, self._objects, digests, record.id) as claim:
                for file in record.blobs():
                    self._send(context, claim, file)
                self._objects.write(context, record_key(owner, record.id), record.encoded())
                self._note_use(owner, record)
                self._make_way(owner, quota)
        except BaseException:
            with suppress(StoreFailed):
                self._remove(owner, record)
            raise
        with suppress(RequestError):  # the cache may be full
            self._local.add(owner, record)
        return record

    def _send(self, context: RequestContext, claim: Claim, file: StoredFile) -> None:
        """Writes a blob, unless it exists."""
        key = f"blobs/{file.blake3}"
        found = self._objects.find(context, key)
        is_whole = found is not None and found.size == file.size
        if is_whole and file.blake3 not in self._damaged:
            return
        (blob,) = self._local.open_files("data", [file])

        def parts() -> Iterator[bytes | memoryview]:
            for part in blob.blocks():
                claim.renew(context)
                yield part

        self._objects.upload(context, key, file.size, parts())
        self._damaged.discard(file.blake3)

    def _make_way(self, owner: str, quota: int | None) -> None:
        """Evicts until all checkpoints fit, with those that are being created."""
        if quota is None and math.isinf(self.max_bytes):
            return
        context = RequestContext()
        usage = self._read_usage(context)
        victims = usage.victims(owner, self.max_bytes, quota)
        for victim, reason in victims:
            assert isinstance(victim, Entry), "uploads are not in this store"
            self._evict(usage, victim, reason)
        self._forget(context, [victim for victim, _ in victims if isinstance(victim, Entry)])

    def _evict(self, usage: Usage, entry: Entry, reason: str) -> None:
        self._objects.remove(RequestContext(), record_key(entry.owner, entry.record.id))
        before = usage.bytes
        usage.accounts.get(entry.owner).remove(entry)
        usage.accounts.forget_record(entry)
        usage.accounts.release(entry.owner, entry.files())
        usage.references.release(entry.files())
        freed = before - usage.bytes
        log.info("evicted %s (%s): %d bytes", entry.record.name, reason, freed)
        self._evicted(reason, freed)

    def _forget(self, context: RequestContext, entries: Iterable[Entry]) -> None:
        """Removes what checkpoints had beside their records, which have been removed."""
        digests: list[str] = []
        for entry in entries:
            digests += [file.blake3 for file in entry.files()]
            self._objects.remove(context, used_key(entry.owner, entry.record))
            with suppress(RequestError):
                self._local.delete(entry.owner, entry.record.name)
        if digests:
            with suppress(DataLoss):  # of a damaged record the blobs are unknown: all are kept
                remove_unnamed(context, self._objects, self._records, digests)

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint, which may be damaged, as Store.delete does."""
        context = RequestContext()
        try:
            record = self._records.get(context, owner, name)
        except DataLoss:  # a sweep removes its blobs
            self._objects.remove(context, record_key(owner, name.removeprefix(PREFIX)))
            return
        self._remove(owner, record)

    def _remove(self, owner: str, record: Record) -> None:
        context = RequestContext()
        self._objects.remove(context, record_key(owner, record.id))
        with suppress(StoreFailed):  # it does not exist any more; a sweep removes the rest
            self._forget(context, [Entry(owner, record, 0.0)])

    def check_size(self, size: int) -> None:
        """Raises StoreFull if `size` bytes would never fit, here or on the local disk."""
        self._local.check_size(size)
        if size > self.max_bytes:
            raise StoreFull("data", f"{size} bytes are more than the store's {self.max_bytes:.0f}")

    def _note_use(self, owner: str, record: Record) -> None:
        now = time.monotonic()
        if now < self._uses.get(record.id, -math.inf) + USE_SECONDS:
            return
        with suppress(StoreFailed):  # the use of a checkpoint that can be read matters more
            self._objects.write(RequestContext(), used_key(owner, record))
            self._uses[record.id] = now
            self._used[used_key(owner, record)] = time.time()

    def _measure(self, usage: Usage) -> None:
        entries = usage.entries
        self.used_bytes, self.count = usage.bytes, len(entries)
        self._used = {used_key(entry.owner, entry.record): entry.used for entry in entries}

    def _read_usage(self, context: RequestContext) -> Usage:
        return read_usage(context, self._objects, self._records, self._local.is_used)

    def _expire(self) -> None:
        swept = time.monotonic()
        while not self._is_closed.wait(EXPIRE_SECONDS):
            try:
                self.expire()
                if time.monotonic() > swept + SWEEP_SECONDS:
                    swept = time.monotonic()
                    self.sweep(SWEEP_SECONDS)
            except (RequestError, OSError) as error:  # the store may work again later
                log.error("cannot remove expired checkpoints: %s", error)

    def expire(self) -> None:
        """Measures the store, and removes checkpoints that have not been used for `ttl` seconds.

        Raises:
            StoreFailed: The object store failed.
        """
        context = RequestContext()
        usage = self._read_usage(context)
        now = time.monotonic()
        self._uses = {ident: at for ident, at in self._uses.items() if at > now - USE_SECONDS}
        oldest = time.time() - self.ttl if self.ttl else -math.inf
        is_used = self._local.is_used
        old = [e for e in usage.entries if e.used < oldest and not is_used(e.owner, e.record)]
        for entry in old:
            self._evict(usage, entry, "ttl")
        self._measure(usage)
        self._forget(context, old)

    def sweep(self, age: float) -> None:
        """Removes what servers that have ended have left behind.

        Args:
            age: Seconds for which an object that no record names is kept.

        Raises:
            DataLoss: A record is damaged, so that its blobs are unknown.
            StoreFailed: The object store failed.
        """
        context = RequestContext()
        named, uses = set[str](), set[str]()
        for owner, record in self._records.by_owner(context):
            named.update(f"blobs/{file.blake3}" for file in record.blobs())
            uses.add(used_key(owner, record))
        blobs = self._older(context, "blobs", age).keys() - named
        remove_unnamed(
            context, self._objects, self._records, [key.removeprefix("blobs/") for key in blobs]
        )
        others = self._older(context, "used", age).keys() - uses
        for prefix in ("claims", "removing"):
            others |= self._older(context, prefix, 2 * LEASE_SECONDS).keys()
        for key in others:
            self._objects.remove(context, key)

    def _older(self, context: RequestContext, prefix: str, age: float) -> dict[str, float]:
        """The objects that are older than `age`, with their times."""
        oldest = time.time() - age
        listed = self._objects.list(context, prefix)
        return {key: found.time for key, found in listed.items() if found.time <= oldest}


def _lost(record: Record, file: StoredFile, what: str) -> DataLoss:
    return DataLoss(
        record.name, f"differs from what was stored: its file {quote(file.filename)} {what}"
    )
