"""Records of checkpoints: files of JSON, each with its own digest."""

import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
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
    """A file of a checkpoint.

    Attributes:
        filename: The caller's name of the file.
        size: Bytes.
        blake3: Hexadecimal, the name of its blob.
    """

    filename: str
    size: int
    blake3: str


@dataclass(frozen=True)
class Record:
    """A checkpoint.

    Attributes:
        id: Its name without the prefix `checkpoints/`.
        create_time: Nanoseconds since 1970.
        files: The weights, in the order of the upload.
        masks: A safetensors file of bits, for each tensor that the server has pruned.
    """

    id: str
    create_time: int
    files: tuple[StoredFile, ...]
    masks: StoredFile | None

    @property
    def name(self) -> str:
        """The name that callers use."""
        return PREFIX + self.id

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes that the record takes on disk, without the checkpoint's files."""
        return blocks_of(len(self.encoded()))

    def blobs(self) -> list[StoredFile]:
        """All files of the checkpoint: weights and masks."""
        return [*self.files, *([self.masks] if self.masks else [])]

    def encoded(self) -> bytes:
        """The content of its file: a line with the digest, and a line of JSON."""
        fields = {
            "id": self.id,
            "create_time": self.create_time,
            "files": self.files,
            "masks": self.masks,
        }
        text = json.dumps(fields, separators=(",", ":"), default=vars).encode()
        return b"%s\n%s\n" % (blake3(text).hexdigest().encode(), text)


def new_record(files: tuple[StoredFile, ...], masks: StoredFile | None) -> Record:
    """Creates a record with a random id. Ids sort by creation time."""
    now = time.time_ns()
    return Record(f"{now:016x}{secrets.token_hex(8)}", now, files, masks)


def write_record(folder: Path, record: Record) -> None:
    """Writes a record, and syncs it.

    Raises:
        StoreFull, StoreFailed: The disk failed.
    """
    write_atomically(record_path(folder, record.id), record.encoded())


def record_path(folder: Path, ident: str) -> Path:
    """The path of a record in its owner's folder."""
    return folder / f"{ident}.json"


def remove_records(folder: Path, idents: Sequence[str]) -> dict[str, OSError]:
    """Removes records from the folder of their owner, and syncs the removal.

    Returns:
        The ids of records that may still be on disk, or return after a crash, with the error.
    """
    try:
        # Opened first: without a free descriptor the removal could not be synced.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return dict.fromkeys(idents, error)
    try:
        failed: dict[str, OSError] = {}
        for ident in idents:
            try:
                record_path(folder, ident).unlink(missing_ok=True)
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
    """The content of the folder of all records.

    Attributes:
        owners: The folders of the owners.
        records: The time of the last use of each, in seconds since 1970, its owner, and the record.
        unreadable: Owners and ids of damaged records.
        unfinished: Files that a crash left behind.
    """

    owners: list[Path] = field(default_factory=list)
    records: list[tuple[float, str, Record]] = field(default_factory=list)
    unreadable: set[tuple[str, str]] = field(default_factory=set)
    unfinished: list[Path] = field(default_factory=list)


def read_records(folder: Path) -> Found:
    """Reads the records of all owners."""
    found = Found([path for path in folder.iterdir() if path.is_dir()])
    for owner in found.owners:
        with os.scandir(owner) as files:
            for file in files:
                _read_file(file, owner.name, found)
    return found


def _read_file(file: os.DirEntry[str], owner: str, found: Found) -> None:
    path = Path(file.path)
    if file.name.startswith(".") and file.name.endswith(".unfinished"):
        found.unfinished.append(path)
    elif file.name.endswith(".json"):
        try:
            found.records.append((file.stat().st_mtime, owner, _read_record(path)))
        except DataLoss as error:
            found.unreadable.add((owner, path.stem))
            log.error("%s", error)


def _read_record(path: Path) -> Record:
    """Reads a record. Raises DataLoss if it is damaged."""
    try:
        return decode_record(path.stem, path.read_bytes())
    except OSError:
        raise damaged_record(PREFIX + path.stem) from None


def decode_record(ident: str, data: bytes) -> Record:
    """Decodes what Record.encoded returns.

    Args:
        ident: Of the record.
        data: Of its file.

    Raises:
        DataLoss: It is damaged.
    """
    try:
        digest, text, _ = data.split(b"\n")
        if blake3(text).hexdigest().encode() != digest:
            raise ValueError
        fields = json.loads(text)
        if fields["id"] != ident:
            raise ValueError
        masks = StoredFile(**fields["masks"]) if fields["masks"] else None
        files = tuple(StoredFile(**file) for file in fields["files"])
        return Record(fields["id"], fields["create_time"], files, masks)
    except (ValueError, KeyError, TypeError):
        raise damaged_record(PREFIX + ident) from None


def damaged_record(name: str) -> DataLoss:
    """The error for a checkpoint whose record is damaged."""
    return DataLoss(name, "differs from what was stored: its record is damaged")
