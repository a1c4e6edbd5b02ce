"""The checkpoints of all callers, on one folder, within a number of bytes.

lock                        held by the server that has the folder
checkpoints/OWNER/ID.json   records: written last, so that what they name is there
blobs/DIGEST, .sums         files, each once, whoever has stored it
parts/                      unfinished; swept at start
"""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from secateur_server.durable import full_disk, sync_folder
from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    QuotaExceeded,
    StoreFull,
    quote,
)
from secateur_server.store.blobs import Blob
from secateur_server.store.records import (
    PREFIX,
    RECORD_BYTES,
    Record,
    StoredFile,
    new_record,
    read_record,
    write_record,
)
from secateur_server.store.shelf import Shelf
from secateur_server.store.uploads import Upload, Uploads

log = logging.getLogger(__name__)

# How often what is too old is looked for.
EXPIRE_SECONDS = 10.0

Key = tuple[str, str]  # an owner, and an id or a digest


class StoreInUse(Exception):
    """Another server has the folder."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint in use.  files: in the record's order, without the masks."""

    record: Record
    files: list[Blob]
    masks: Blob | None


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
        self.max_bytes = max_bytes
        self.ttl = ttl
        self._evicted = evicted
        self._folder = folder
        self._is_temporary = is_temporary
        self.scratch = folder / "parts"
        self._lock = threading.RLock()
        self._shelf = Shelf(folder / "blobs", self._lock)
        self.uploads = Uploads(self._shelf, self.scratch, self._lock, self._owns, self._make_room)
        self._records: dict[Key, Record] = {}
        self._used_at: dict[Key, float] = {}
        self._pins: Counter[Key] = Counter()
        for path in (self._shelf.folder, self.scratch, folder / "checkpoints"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._hold()
        self._load()
        self._is_closed = threading.Event()
        self._expiring = threading.Thread(target=self._expire, name="expire", daemon=True)
        self._expiring.start()

    def _hold(self) -> None:
        """Keeps other servers away from the folder."""
        self._lock_file = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise StoreInUse(f"another server keeps its checkpoints in {self._folder}") from None

    def _load(self) -> None:
        """Reads the records, and sweeps what was not finished."""
        are_whole = True
        for path in sorted(self._folder.glob("checkpoints/*/*.json")):
            key = path.parent.name, path.stem
            try:
                self._add(key, read_record(path), path.stat().st_mtime)
            except DataLoss as error:
                are_whole = False  # what it needs is unknown
                log.error("%s", error)
        unfinished = [*self.scratch.iterdir(), *self._folder.glob("checkpoints/*/.*.unfinished")]
        if are_whole:
            unfinished += self._shelf.unknown()
        count = sum(path.stat().st_size for path in unfinished)
        for path in unfinished:
            path.unlink()
        log.info(
            "store %s: %d checkpoints, %d bytes; swept %d unfinished files of %d bytes",
            *(self._folder, len(self._records), self.used_bytes, len(unfinished), count),
        )

    def _add(self, key: Key, record: Record, used: float) -> None:
        self._shelf.refer(record.blobs())
        self._records[key], self._used_at[key] = record, used

    def close(self) -> None:
        """Gives the folder to whoever wants it next."""
        self._is_closed.set()
        self._expiring.join()
        self.uploads.close()
        self._lock_file.close()
        if self._is_temporary:
            shutil.rmtree(self._folder)

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those that are announced and not here yet."""
        with self._lock:
            records = RECORD_BYTES * len(self._records)
            return self._shelf.size() + self.uploads.size() + records

    @property
    def count(self) -> int:
        """How many checkpoints there are."""
        return len(self._records)

    def get(self, owner: str, name: str) -> Record:
        """The record of a checkpoint.  Errors: CheckpointNotFound, DataLoss."""
        with self._lock:
            return self._records[self._key(owner, name)]

    def expire_time(self, owner: str, record: Record) -> float | None:
        """When a checkpoint goes, in seconds since 1970; None is never."""
        used = self._used_at.get((owner, record.id))
        return used + self.ttl if self.ttl and used is not None else None

    def page(self, owner: str, before: str, most: int) -> Sequence[Record]:
        """Up to `most` checkpoints, the newest first.  before: those older than this id."""
        with self._lock:
            mine = [r for (of, _), r in self._records.items() if of == owner]
        mine.sort(key=lambda record: record.id, reverse=True)
        return [record for record in mine if not before or record.id < before][:most]

    def _key(self, owner: str, name: str) -> Key:
        """Errors: CheckpointNotFound, DataLoss."""
        key = owner, name.removeprefix(PREFIX)
        if name.startswith(PREFIX):
            if key in self._records:
                return key
            # The text is the caller's: it is looked up among names, and never made a path.
            folder = self._folder / "checkpoints" / owner
            if folder.is_dir() and f"{key[1]}.json" in os.listdir(folder):
                raise DataLoss(name, "is not what was stored: its record differs")
        raise CheckpointNotFound("checkpoint", f"there is no {quote(name)}")

    @contextmanager
    def open(self, owner: str, name: str) -> Iterator[OpenCheckpoint]:
        """Opens a checkpoint, which is neither evicted nor lost while the block runs.

        Errors: CheckpointNotFound, DataLoss.
        """
        with self._lock:
            key = self._key(owner, name)
            record = self._records[key]
            self._touch(key)
            self._pins[key] += 1
            self._shelf.refer(record.blobs())
        try:
            files = self.open_files(record.name, record.files)
            masks = self._shelf.open(record.name, record.masks) if record.masks else None
            yield OpenCheckpoint(record, files, masks)
        finally:
            with self._lock:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
                if key in self._records:
                    self._touch(key)  # a call may take longer than the ttl
                self._shelf.release(record.blobs())

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that an upload of the caller holds.  Errors: DataLoss."""
        return [self._shelf.open(name, file) for file in files]

    def _owns(self, owner: str, digest: str, size: int) -> bool:
        """Whether a checkpoint of `owner` has a file."""
        return any(
            (file.blake3, file.size) == (digest, size)
            for (of, _), record in self._records.items()
            if of == owner
            for file in record.blobs()
        )

    def _touch(self, key: Key) -> None:
        self._used_at[key] = now = time.time()
        with suppress(OSError):  # of a full disk, or a record that somebody took away
            os.utime(self._record_path(key), (now, now))  # the system's own clock is coarser

    def _record_path(self, key: Key) -> Path:
        return self._folder / "checkpoints" / key[0] / f"{key[1]}.json"

    def create(
        self, owner: str, files: tuple[StoredFile, ...], masks: StoredFile | None = None
    ) -> Record:
        """Makes a checkpoint of files that are here. It is on disk when this returns.

        Errors: StoreFull.
        """
        record = new_record(files, masks)
        key = owner, record.id
        folder = self._record_path(key).parent
        with self._lock:
            if not folder.is_dir():
                with full_disk():
                    folder.mkdir(mode=0o700)
                    sync_folder(folder.parent)
            self._shelf.refer(record.blobs())
        try:
            write_record(folder, record)
        except BaseException:
            self._record_path(key).unlink(missing_ok=True)
            self._shelf.release(record.blobs())
            raise
        with self._lock:
            self._records[key], self._used_at[key] = record, time.time()
        return record

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint, and what is left of a damaged one.  Errors: CheckpointNotFound."""
        with self._lock:
            try:
                self._remove(self._key(owner, name))
            except DataLoss:  # what it needed is unknown, and swept at the next start
                self._record_path((owner, name.removeprefix(PREFIX))).unlink()

    def _remove(self, key: Key) -> int:
        """Returns: the bytes that this made free."""
        before = self.used_bytes
        path = self._record_path(key)
        with suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)
        del self._used_at[key]
        self._shelf.release(self._records.pop(key).blobs())
        return before - self.used_bytes

    def _expire(self) -> None:
        while not self._is_closed.wait(EXPIRE_SECONDS):
            self.expire()

    def expire(self) -> None:
        """Lets go what nobody has used for too long."""
        now = time.time()
        with self._lock:
            old = [key for key, used in self._used_at.items() if self.ttl and used + self.ttl < now]
            for key in old:
                if not self._pins[key]:
                    self._evict(key, "ttl")
            self.uploads.expire()

    def check_size(self, size: int) -> None:
        """Errors: StoreFull, where `size` bytes never fit."""
        if size > self.max_bytes:
            raise StoreFull("data", f"{size} bytes are more than the store's {self.max_bytes}")

    def _make_room(self, count: int, owner: str, quota: int | None) -> None:
        """Lets the least recently used go until `count` bytes fit.

        quota: of the owner, of whom enough goes first; None is no bound.
        Errors: StoreFull, QuotaExceeded, where they would not fit without all of that: then
        nothing goes.
        """
        if quota is not None:
            self._make_room_of(owner, count, quota)
        if (used := self.used_bytes) + count <= self.max_bytes:
            return
        idle = [(upload.used, upload) for upload in self.uploads.idle()]
        unused = [(used, key) for key, used in self._used_at.items() if not self._pins[key]]
        victims: list[tuple[float, Upload | Key]] = [*idle, *unused]
        if used - self._freed(victim for _, victim in victims) + count > self.max_bytes:
            raise StoreFull(
                "data", f"{count} bytes do not fit: the store holds {used} of {self.max_bytes}"
            )
        for _, victim in sorted(victims, key=lambda pair: pair[0]):
            if self.used_bytes + count <= self.max_bytes:
                break
            self._let_go(victim, "room")

    def _let_go(self, victim: Upload | Key, reason: str) -> None:
        if isinstance(victim, Upload):
            self.uploads.abandon(victim)
        else:
            self._evict(victim, reason)

    def _make_room_of(self, owner: str, count: int, quota: int) -> None:
        """Errors: QuotaExceeded."""
        uploads = self.uploads.of(owner)
        mine = [key for key in self._records if key[0] == owner]
        in_use: list[Upload | Key] = [upload for upload in uploads if upload.is_active]
        in_use += [key for key in mine if self._pins[key]]
        if self._bytes_of(in_use) + count > quota:
            raise QuotaExceeded("data", f"{count} bytes do not fit the {quota} that you may keep")
        unused: list[tuple[float, Upload | Key]] = [
            *((upload.used, upload) for upload in uploads if not upload.is_active),
            *((self._used_at[key], key) for key in mine if not self._pins[key]),
        ]
        rest = [victim for _, victim in sorted(unused, key=lambda pair: pair[0], reverse=True)]
        while self._bytes_of([*in_use, *rest]) + count > quota:
            self._let_go(rest.pop(), "quota")

    def _bytes_of(self, held: Iterable[Upload | Key]) -> int:
        """What some checkpoints and uploads take: a file once, however many have it."""
        files, count = dict[str, int](), 0
        for one in held:
            if not isinstance(one, Upload):
                count += RECORD_BYTES
                files |= {file.blake3: file.size for file in self._records[one].blobs()}
            elif one.part:
                count += one.size
            else:
                files[one.digest or ""] = one.size
        return count + sum(files.values())

    def _freed(self, victims: Iterable[Upload | Key]) -> int:
        """What is free when all of these are gone: a blob is where nobody else has it."""
        freed, references = 0, Counter[str]()
        for victim in victims:
            if not isinstance(victim, Upload):
                freed += RECORD_BYTES
                references.update(file.blake3 for file in self._records[victim].blobs())
            elif victim.part:
                freed += victim.size
            else:
                references[victim.digest or ""] += 1
        return freed + self._shelf.bytes_freed(references)

    def _evict(self, key: Key, reason: str) -> None:
        name = self._records[key].name
        freed = self._remove(key)
        log.info("evicted %s (%s): %d bytes", name, reason, freed)
        self._evicted(reason, freed)


def default_max_bytes(folder: Path) -> int:
    """Three quarters of what is free on the disk of a store, and of what it has there already.

    Of what is free alone it would be less with each start, and drive out what was kept.
    """
    held = sum(path.stat().st_size for path in folder.glob("blobs/*"))
    return (shutil.disk_usage(folder).free + held) * 3 // 4


def temporary_folder() -> Path:
    """A private folder for a store that ends with its server; those that were left behind go."""
    import tempfile

    for path in Path(tempfile.gettempdir()).glob("secateur-store-*"):
        with suppress(OSError), (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix="secateur-store-"))
