"""What a checkpoint is, as a file of JSON that holds its own digest."""

import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from secateur_server.errors import DataLoss
from secateur_server.runtime.disk import blocks_of, write_atomically

log = logging.getLogger(__name__)

PREFIX = "checkpoints/"


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint.  blake3: hexadecimal, the name of its blob."""

    filename: str
    size: int
    blake3: str


@dataclass(frozen=True)
class Record:
    """A checkpoint.

    create_time: nanoseconds since 1970.  files: the weights, in the order of the upload.
    masks: a safetensors file of bits, for each tensor that was pruned here.
    """

    id: str
    create_time: int
    files: tuple[StoredFile, ...]
    masks: StoredFile | None

    @property
    def name(self) -> str:
        """Its name, as callers know it."""
        return PREFIX + self.id

    @cached_property
    def disk_bytes(self) -> int:
        """What it takes on disk, without its files."""
        return blocks_of(len(self.encoded()))

    def blobs(self) -> list[StoredFile]:
        """All that it needs."""
        return [*self.files, *([self.masks] if self.masks else [])]

    def encoded(self) -> bytes:
        """What its file has: a digest, and JSON."""
        fields = {
            "id": self.id,
            "create_time": self.create_time,
            "files": self.files,
            "masks": self.masks,
        }
        text = json.dumps(fields, separators=(",", ":"), default=vars).encode()
        return b"%s\n%s\n" % (blake3(text).hexdigest().encode(), text)


def new_record(files: tuple[StoredFile, ...], masks: StoredFile | None) -> Record:
    """A record of a name that nobody can guess; later ones sort behind."""
    now = time.time_ns()
    return Record(f"{now:016x}{secrets.token_hex(8)}", now, files, masks)


def write_record(folder: Path, record: Record) -> None:
    """Puts a record on disk.  Errors: StoreFull, StoreFailed."""
    write_atomically(record_path(folder, record.id), record.encoded())


def record_path(folder: Path, ident: str) -> Path:
    """The record of a checkpoint, in the folder of its owner."""
    return folder / f"{ident}.json"


def remove_records(folder: Path, idents: Sequence[str]) -> dict[str, OSError]:
    """Removes records of an owner. They stay removed after a crash.

    Returns:
        The ids of records that may still be on disk, or back there after a crash, and why.
    """
    try:
        # First: a process that has no descriptor left could not sync what it has removed.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return dict.fromkeys(idents, error)
    try:
        failed: dict[str, OSError] = {}
        for ident in idents:
            try:
                with suppress(FileNotFoundError):
                    record_path(folder, ident).unlink()
            except OSError as error:
                failed[ident] = error
        os.fsync(opened)
    except OSError as error:
        return dict.fromkeys(idents, error)
    finally:
        os.close(opened)
    return failed


@dataclass
class Found:
    """What the folder of an owner holds.

    Attributes:
        records: Each with the time of its last use, in seconds since 1970.
        unreadable: Ids of records that differ from what was written.
        unfinished: What a crash left.
    """

    records: list[tuple[Record, float]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


def read_records(folder: Path) -> Found:
    """Reads the records of an owner."""
    found = Found()
    with os.scandir(folder) as files:
        for file in files:
            path = Path(file.path)
            if file.name.startswith(".") and file.name.endswith(".unfinished"):
                found.unfinished.append(path)
            elif file.name.endswith(".json"):
                try:
                    found.records.append((read_record(path), file.stat().st_mtime))
                except DataLoss as error:
                    found.unreadable.append(path.stem)
                    log.error("%s", error)
    return found


def read_record(path: Path) -> Record:
    """Reads a record.  Errors: DataLoss."""
    try:
        digest, text, _ = path.read_bytes().split(b"\n")
        if blake3(text).hexdigest().encode() != digest:
            raise ValueError
        fields = json.loads(text)
        if fields["id"] != path.stem:
            raise ValueError
        masks = StoredFile(**fields["masks"]) if fields["masks"] else None
        files = tuple(StoredFile(**file) for file in fields["files"])
        return Record(fields["id"], fields["create_time"], files, masks)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataLoss(PREFIX + path.stem, "is not what was stored: its record differs") from None
