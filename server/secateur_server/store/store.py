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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur_server.durable import sync_folder
from secateur_server.errors import (
    CheckpointNotFound,
    DataLoss,
    InvalidRequest,
    InvalidStateDict,
    StoreFull,
    TakenOver,
    quote,
)
from secateur_server.store.blobs import Blob, Part, open_blob, remove_blob, sums_bytes
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

    size: as announced.  part: until it is whole.  skip: bytes to come that are there already.
    is_active: whether a call is at it.  is_stale: whether a newer call has taken it over.
    used: when the last byte came.
    """

    owner: str
    size: int
    digest: str | None
    part: Part | None
    skip: int = 0
    is_active: bool = True
    is_stale: bool = False
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
            parts = sum(upload.size for upload in self._uploads if upload.part)
            return blobs + parts + RECORD_BYTES * len(self._records)

    @property
    def count(self) -> int:
        """How many checkpoints there are."""
        return len(self._records)

    def get(self, owner: str, name: str) -> Record:
        """The record of a checkpoint.  Errors: CheckpointNotFound, DataLoss."""
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
        if key in self._records and name.startswith(PREFIX):
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
        self._used_at[key] = time.time()
        with suppress(OSError):  # of a full disk, or a record that somebody took away
            os.utime(self._record_path(key))

    def _record_path(self, key: Key) -> Path:
        return self._folder / "checkpoints" / key[0] / f"{key[1]}.json"

    # Files come -----------------------------------------------------------------------------

    def held(self, owner: str, digest: str, size: int) -> int:
        """How many bytes there are of a file that `owner` has sent, or has stored."""
        with self._lock:
            upload = self._upload(owner, digest, size)
            if upload:
                return upload.held
            return size if self._owns(owner, digest, size) else 0

    def _upload(self, owner: str, digest: str | None, size: int) -> Upload | None:
        wanted = owner, digest, size
        mine = (u for u in self._uploads if digest and (u.owner, u.digest, u.size) == wanted)
        return next(mine, None)

    def _owns(self, owner: str, digest: str, size: int) -> bool:
        """Whether a checkpoint of `owner` has a file, and nothing is known against it."""
        return digest not in self._damaged and any(
            (file.blake3, file.size) == (digest, size)
            for (of, _), record in self._records.items()
            if of == owner
            for file in record.blobs()
        )

    def begin(self, owner: str, size: int, digest: str | None, offset: int) -> Upload:
        """Takes a file, or what is missing of it.

        offset: what the caller does not send.  Errors: InvalidRequest, StoreFull.
        """
        with self._lock:
            upload = self._upload(owner, digest, size)
            if upload and upload.part:
                upload = self._take_over(upload)
            held = self.held(owner, digest, size) if digest else 0
            if offset > held:
                raise InvalidRequest(
                    "header.files.offset", f"{offset} is more than the {held} bytes that are here"
                )
            if digest and held == size:
                upload = Upload(owner, size, digest, None)
                self._refer(StoredFile("", size, digest))
                self._uploads.append(upload)
            elif upload is None:
                self._make_room(size + sums_bytes(size) + RECORD_BYTES)
                upload = Upload(owner, size, digest, self._new_part())
                self._uploads.append(upload)
            upload.skip = held - offset
            return upload

    def _take_over(self, before: Upload) -> Upload:
        """The upload for a new call; the call that may still be at it ends with its next byte."""
        with before.writing:
            before.is_stale = True
        upload = replace(before, is_stale=False, is_active=True, used=time.time())
        self._uploads[self._uploads.index(before)] = upload
        return upload

    def _new_part(self) -> Part:
        return Part(self.scratch / secrets.token_hex(8))

    def write(self, upload: Upload, data: bytes | memoryview) -> None:
        """The next bytes of a file.  Errors: StoreFull, TakenOver."""
        with upload.writing:  # two calls at one upload never mix their bytes
            if upload.is_stale:
                raise TakenOver("header", "another call of the same caller sends this file")
            fresh = memoryview(data)[min(upload.skip, len(data)) :]
            upload.skip -= len(data) - len(fresh)
            upload.used = time.time()
            if fresh:
                assert upload.part is not None, "what is whole takes no more"
                upload.part.write(fresh)

    def finish(self, upload: Upload, filename: str) -> StoredFile:
        """Makes a file whole, on disk.  Errors: InvalidStateDict, StoreFull."""
        if upload.part:
            found = upload.part.digest()
            if upload.digest not in (None, found):
                self.abandon(upload)
                raise InvalidStateDict(
                    "data", f"{quote(filename)} has the BLAKE3 {found}, announced {upload.digest}"
                )
            file = StoredFile(filename, upload.size, found)
            self._refer(file)  # first: nobody may remove the blob once it is there
            try:
                upload.part.finish(self._blobs)
            except BaseException:
                self._release([file])
                raise
            upload.digest, upload.part = found, None
            self._damaged.discard(found)
        assert upload.digest is not None, "a whole file has one"
        return StoredFile(filename, upload.size, upload.digest)

    def leave(self, upload: Upload) -> None:
        """The call that sent a file has ended: what can go on later is held for a while."""
        if upload.digest is None:
            self.abandon(upload)
        upload.is_active, upload.used = False, time.time()

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
                folder.mkdir(mode=0o700)
                sync_folder(folder.parent)
            for file in record.blobs():
                self._refer(file)
        try:
            write_record(folder, record)
        except BaseException:
            with self._lock:
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
        """Lets the least recently used go until `count` bytes fit.  Errors: StoreFull."""
        idle = [(upload.used, upload) for upload in self._uploads if not upload.is_active]
        unused = [(used, key) for key, used in self._used_at.items() if not self._pins[key]]
        oldest: Sequence[tuple[float, Upload | Key]] = [*idle, *unused]
        for _, victim in sorted(oldest, key=lambda pair: pair[0]):
            if self.used_bytes + count <= self.max_bytes or count > self.max_bytes:
                break
            if isinstance(victim, Upload):
                self.abandon(victim)
            else:
                self._evict(victim, "room")
        if (used := self.used_bytes) + count > self.max_bytes:
            raise StoreFull(
                "data", f"{count} bytes do not fit: the store holds {used} of {self.max_bytes}"
            )

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
