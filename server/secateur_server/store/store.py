"""The checkpoints of all callers, on one folder, within a number of bytes.

lock                        held by the server that has the folder
checkpoints/OWNER/ID.json   records: written last, so that what they name is there
blobs/DIGEST, .sums         files, each once, whoever has stored it
parts/                      unfinished; swept at start
"""

import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from secateur_server.devices.watch import watch
from secateur_server.durable import full_disk, sync_folder
from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    InvalidRequest,
    InvalidStateDict,
    StoreFull,
    TakenOver,
    quote,
)
from secateur_server.store.blobs import (
    Blob,
    Part,
    has_blob,
    open_blob,
    remove_blob,
    sums_bytes,
)
from secateur_server.store.records import (
    PREFIX,
    Record,
    StoredFile,
    new_record,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

# How long what an upload left behind is held, from the last byte on.
UPLOAD_SECONDS = 3600.0

# How often what is too old is looked for.
EXPIRE_SECONDS = 10.0

# What a record is counted for: a block of most file systems.
RECORD_BYTES = 4096

Key = tuple[str, str]  # an owner, and an id or a digest


class StoreInUse(Exception):
    """Another server has the folder."""


@dataclass(eq=False)
class Upload:
    """A file that a caller sends, or has sent and not made a checkpoint of.

    size: as announced.  part: until it is whole.  at: where in the file the call's next byte is.
    is_resumable: whether it outlasts the call.  is_active: whether a call is at it.
    is_stale: whether a newer call has taken it over.  is_finishing: whether it becomes a blob.
    used: when the last byte came.
    """

    owner: str
    size: int
    digest: str | None
    part: Part | None
    at: int
    is_resumable: bool
    is_active: bool = True
    is_stale: bool = False
    is_finishing: bool = False
    used: float = field(default_factory=time.time)
    writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def held(self) -> int:
        """Bytes that are here."""
        return self.part.size if self.part else self.size


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
        self._blobs, self.scratch = folder / "blobs", folder / "parts"
        self._lock = threading.RLock()
        self._records: dict[Key, Record] = {}
        self._used_at: dict[Key, float] = {}
        self._pins: Counter[Key] = Counter()
        self._uploads: list[Upload] = []
        self._references: Counter[str] = Counter()  # by digest
        self._sizes: dict[str, int] = {}  # of the blobs that are referred to
        self._damaged: set[str] = set()
        for path in (self._blobs, self.scratch, folder / "checkpoints"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._hold()
        self._load()
        self._is_closed = threading.Event()
        self._expiring = threading.Thread(target=self._expire, name="expire", daemon=True)
        self._expiring.start()

    # At start -------------------------------------------------------------------------------

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
            known = {name for digest in self._sizes for name in (digest, f"{digest}.sums")}
            unfinished += [path for path in self._blobs.iterdir() if path.name not in known]
        count = sum(path.stat().st_size for path in unfinished)
        for path in unfinished:
            path.unlink()
        log.info(
            "store %s: %d checkpoints, %d bytes; swept %d unfinished files of %d bytes",
            *(self._folder, len(self._records), self.used_bytes, len(unfinished), count),
        )

    def _add(self, key: Key, record: Record, used: float) -> None:
        for file in record.blobs():
            self._refer(file)
        self._records[key], self._used_at[key] = record, used

    def close(self) -> None:
        """Gives the folder to whoever wants it next."""
        self._is_closed.set()
        self._expiring.join()
        for upload in list(self._uploads):
            self.abandon(upload)
        self._lock_file.close()
        if self._is_temporary:
            shutil.rmtree(self._folder)

    # What there is --------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those that are announced and not here yet."""
        with self._lock:
            blobs = sum(size + sums_bytes(size) for size in self._sizes.values())
            parts = sum(u.size for u in self._uploads if u.part and not u.is_finishing)
            return blobs + parts + RECORD_BYTES * len(self._records)

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
            for file in record.blobs():
                self._refer(file)
        try:
            files = [self._open(record.name, file) for file in record.files]
            masks = self._open(record.name, record.masks) if record.masks else None
            yield OpenCheckpoint(record, files, masks)
        finally:
            with self._lock:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
                self._release(record.blobs())

    def open_files(self, name: str, files: Sequence[StoredFile]) -> list[Blob]:
        """Opens files that an upload of the caller holds.  Errors: DataLoss."""
        return [self._open(name, file) for file in files]

    def _open(self, name: str, file: StoredFile) -> Blob:
        def damaged() -> None:
            log.error("%s is damaged: blob %s", name, file.blake3)
            self._damaged.add(file.blake3)

        return open_blob(self._blobs / file.blake3, file.size, name, file.filename, damaged)

    def _touch(self, key: Key) -> None:
        self._used_at[key] = now = time.time()
        with suppress(OSError):  # of a full disk, or a record that somebody took away
            os.utime(self._record_path(key), (now, now))  # the system's own clock is coarser

    def _record_path(self, key: Key) -> Path:
        return self._folder / "checkpoints" / key[0] / f"{key[1]}.json"

    # Files come -----------------------------------------------------------------------------

    def held(self, owner: str, digest: str, size: int) -> int:
        """How many bytes there are of a file that `owner` has sent, or has stored."""
        with self._lock:
            if self._owns(owner, digest, size):
                return size
            upload = self._unfinished(owner, digest, size)
            return upload.held if upload else 0

    def _unfinished(self, owner: str, digest: str | None, size: int) -> Upload | None:
        wanted = owner, digest, size
        mine = (u for u in self._uploads if (u.owner, u.digest, u.size) == wanted)
        return next((upload for upload in mine if upload.part and upload.is_resumable), None)

    def _owns(self, owner: str, digest: str, size: int) -> bool:
        """Whether a checkpoint or an upload of `owner` has a file, and nothing is against it."""
        if digest in self._damaged or not has_blob(self._blobs / digest, size):
            return False
        return any(
            (upload.owner, upload.digest, upload.size) == (owner, digest, size) and not upload.part
            for upload in self._uploads
        ) or any(
            (file.blake3, file.size) == (digest, size)
            for (of, _), record in self._records.items()
            if of == owner
            for file in record.blobs()
        )

    def begin(
        self,
        owner: str,
        size: int,
        digest: str | None = None,
        offset: int = 0,
        field: str = "offset",
        is_resumable: bool = False,
    ) -> Upload:
        """Takes a file, or what is missing of it.

        offset: what the caller does not send.  field: of the request, which has it.
        is_resumable: whether what has come outlasts the call.  Errors: InvalidRequest, StoreFull.
        """
        while True:
            with self._lock:
                before = self._unfinished(owner, digest, size) if is_resumable else None
                if before is None or not before.is_finishing:
                    upload = Upload(owner, size, digest, None, offset, is_resumable)
                    return self._begin(upload, before, field)
            with before.writing:  # until it is whole
                pass

    def _begin(self, upload: Upload, before: Upload | None, field: str) -> Upload:
        """before: an upload of the same file."""
        digest, size = upload.digest, upload.size
        is_here = digest is not None and self._owns(upload.owner, digest, size)
        held = size if is_here else before.held if before else 0
        if upload.at > held:
            raise InvalidRequest(field, f"{upload.at} is more than the {held} bytes that are here")
        if is_here:
            self._begin_whole(upload)
        elif before:
            before.is_stale = True  # the call that may still be at it ends with its next byte
            upload.part, upload.writing = before.part, before.writing
            self._uploads[self._uploads.index(before)] = upload
        else:
            self._make_room(size + sums_bytes(size) + RECORD_BYTES)
            upload.part = Part(self.scratch / secrets.token_hex(8))
            self._uploads.append(upload)
        return upload

    def _begin_whole(self, upload: Upload) -> None:
        """All of the file is here: it stays while the call runs."""
        self._refer(StoredFile("", upload.size, upload.digest or ""))
        self._uploads.append(upload)
        try:
            self._make_room(RECORD_BYTES)
        except StoreFull:
            self.abandon(upload)
            raise

    def write(self, upload: Upload, data: bytes | memoryview) -> None:
        """The next bytes of a file.  Errors: StoreFull, TakenOver."""
        with upload.writing:  # two calls at one upload never mix their bytes
            self._check_mine(upload)
            known = min(upload.held - upload.at, len(data))
            upload.at += len(data)
            upload.used = time.time()
            if known < len(data):
                assert upload.part is not None, "what is whole takes no more"
                upload.part.write(memoryview(data)[known:])

    def _check_mine(self, upload: Upload) -> None:
        if upload.is_stale:
            raise TakenOver("header", "another call of the same caller sends this file")

    def finish(self, upload: Upload, filename: str) -> StoredFile:
        """Makes a file whole, on disk.

        Errors: InvalidStateDict, StoreFull, TakenOver; DataLoss, where what was there has changed.
        """
        with upload.writing:  # whom it was taken from may still be at a last byte
            with self._lock:
                self._check_mine(upload)
                file, part = self._becomes(upload, filename), upload.part
                if part:
                    self._refer(file)  # first: nobody may remove the blob once it is there
                    upload.is_finishing = True
            if part:
                self._finish_part(upload, part, file)
                return file
        try:
            self._check_whole(file)  # the caller may throw away what it has
        except DataLoss:
            self.abandon(upload)
            raise
        return file

    def _becomes(self, upload: Upload, filename: str) -> StoredFile:
        """Errors: InvalidStateDict, where the file is not what was announced."""
        found = upload.part.digest() if upload.part else upload.digest or ""
        if upload.digest not in (None, found):
            self.abandon(upload)
            raise InvalidStateDict(
                "data", f"{quote(filename)} has the BLAKE3 {found}, announced {upload.digest}"
            )
        return StoredFile(filename, upload.size, found)

    def _finish_part(self, upload: Upload, part: Part, file: StoredFile) -> None:
        try:
            part.finish(self._blobs)
        except BaseException:
            self.abandon(upload)
            self._release([file])
            raise
        with self._lock:
            upload.digest, upload.part, upload.is_finishing = file.blake3, None, False
            self._damaged.discard(file.blake3)

    def _check_whole(self, file: StoredFile) -> None:
        """Errors: DataLoss."""
        blob = self._open("data", file)
        for block in range(blob.block_count):
            watch().check()
            blob.check(block)

    def leave(self, upload: Upload) -> None:
        """The call that sent a file has ended: what can go on later is held for a while."""
        if not upload.is_resumable:
            self.abandon(upload)
        upload.is_active = False

    def abandon(self, upload: Upload) -> None:
        """Leaves nothing of an upload."""
        with self._lock:
            if upload not in self._uploads:
                return
            self._uploads.remove(upload)
            if upload.part:
                upload.part.discard()
            else:
                self._release([StoredFile("", upload.size, upload.digest or "")])

    # Checkpoints come and go ----------------------------------------------------------------

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
            for file in record.blobs():
                self._refer(file)
        try:
            write_record(folder, record)
        except BaseException:
            self._record_path(key).unlink(missing_ok=True)
            self._release(record.blobs())
            raise
        with self._lock:
            self._records[key], self._used_at[key] = record, time.time()
        return record

    def delete(self, owner: str, name: str) -> None:
        """Deletes a checkpoint.  Errors: CheckpointNotFound, DataLoss."""
        with self._lock:
            self._remove(self._key(owner, name))

    def _remove(self, key: Key) -> int:
        """Returns: the bytes that this made free."""
        before = self.used_bytes
        path = self._record_path(key)
        with suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)
        del self._used_at[key]
        self._release(self._records.pop(key).blobs())
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
            for upload in list(self._uploads):
                if not upload.is_active and upload.used + UPLOAD_SECONDS < now:
                    self.abandon(upload)

    def check_size(self, size: int) -> None:
        """Errors: StoreFull, where `size` bytes never fit."""
        if size > self.max_bytes:
            raise StoreFull("data", f"{size} bytes are more than the store's {self.max_bytes}")

    def _make_room(self, count: int) -> None:
        """Lets the least recently used go until `count` bytes fit.

        Errors: StoreFull, where they would not fit without all of that: then nothing goes.
        """
        if (used := self.used_bytes) + count <= self.max_bytes:
            return
        idle = [(upload.used, upload) for upload in self._uploads if not upload.is_active]
        unused = [(used, key) for key, used in self._used_at.items() if not self._pins[key]]
        victims: list[tuple[float, Upload | Key]] = [*idle, *unused]
        if used - self._freed(victim for _, victim in victims) + count > self.max_bytes:
            raise StoreFull(
                "data", f"{count} bytes do not fit: the store holds {used} of {self.max_bytes}"
            )
        for _, victim in sorted(victims, key=lambda pair: pair[0]):
            if self.used_bytes + count <= self.max_bytes:
                break
            if isinstance(victim, Upload):
                self.abandon(victim)
            else:
                self._evict(victim, "room")

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
        gone = (d for d, count in references.items() if count == self._references[d])
        return freed + sum(self._sizes[d] + sums_bytes(self._sizes[d]) for d in gone)

    def _evict(self, key: Key, reason: str) -> None:
        name = self._records[key].name
        freed = self._remove(key)
        log.info("evicted %s (%s): %d bytes", name, reason, freed)
        self._evicted(reason, freed)

    def _refer(self, file: StoredFile) -> None:
        with self._lock:
            self._references[file.blake3] += 1
            self._sizes[file.blake3] = file.size

    def _release(self, files: Sequence[StoredFile]) -> None:
        with self._lock:
            for file in files:
                self._references[file.blake3] -= 1
                if not self._references[file.blake3]:
                    del self._references[file.blake3], self._sizes[file.blake3]
                    remove_blob(self._blobs / file.blake3)


def temporary_folder() -> Path:
    """A private folder for a store that ends with its server; those that were left behind go."""
    import tempfile

    for path in Path(tempfile.gettempdir()).glob("secateur-store-*"):
        with suppress(OSError), (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    return Path(tempfile.mkdtemp(prefix="secateur-store-"))
