"""Files on their way into the store: sent by callers in several calls, or made by the server."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from secateur_server.devices import passes_of
from secateur_server.errors import (
    DataLoss,
    InvalidRequest,
    InvalidStateDict,
    QuotaExceeded,
    StoreFull,
    TakenOver,
    quote,
)
from secateur_server.store.blobs import Part, sums_bytes
from secateur_server.store.records import RECORD_BYTES, StoredFile
from secateur_server.store.shelf import Shelf

# How long what an upload left behind is held, from the last byte on.
UPLOAD_SECONDS = 3600.0


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


class Uploads:
    """The uploads of all callers.

    scratch: a folder for what is not whole.
    owns: whether a checkpoint of an owner has a file of some digest and size.
    make_room: lets others go until so many bytes fit, of an owner with a quota; raises StoreFull
        and QuotaExceeded.
    """

    def __init__(
        self,
        shelf: Shelf,
        scratch: Path,
        lock: threading.RLock,
        owns: Callable[[str, str, int], bool],
        make_room: Callable[[int, str, int | None], None],
    ) -> None:
        self._shelf, self._scratch, self._lock = shelf, scratch, lock
        self._is_of_checkpoint, self._make_room = owns, make_room
        self._uploads: list[Upload] = []

    def size(self) -> int:
        """Bytes that are announced of files that are not whole, here or not."""
        return sum(u.size for u in self._uploads if u.part and not u.is_finishing)

    def of(self, owner: str) -> list[Upload]:
        """Those of an owner."""
        return [upload for upload in self._uploads if upload.owner == owner]

    def idle(self) -> list[Upload]:
        """What no call is at."""
        return [upload for upload in self._uploads if not upload.is_active]

    def expire(self) -> None:
        """Lets go what nobody has gone on with for too long."""
        for upload in self.idle():
            if upload.used + UPLOAD_SECONDS < time.time():
                self.abandon(upload)

    def close(self) -> None:
        """Leaves nothing of any."""
        for upload in list(self._uploads):
            self.abandon(upload)

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
        if not self._shelf.has(digest, size):
            return False
        wanted = owner, digest, size
        whole = (upload for upload in self._uploads if not upload.part)
        of_upload = any((u.owner, u.digest, u.size) == wanted for u in whole)
        return of_upload or self._is_of_checkpoint(*wanted)

    def begin(
        self,
        owner: str,
        size: int,
        digest: str | None = None,
        offset: int = 0,
        field: str = "offset",
        is_resumable: bool = False,
        quota: int | None = None,
    ) -> Upload:
        """Takes a file, or what is missing of it.

        offset: what the caller does not send.  field: of the request, which has it.
        is_resumable: whether what has come outlasts the call.
        quota: bytes that the owner may have here; None is no bound.
        Errors: InvalidRequest, StoreFull, QuotaExceeded.
        """
        while True:
            with self._lock:
                before = self._unfinished(owner, digest, size) if is_resumable else None
                if before is None or not before.is_finishing:
                    upload = Upload(owner, size, digest, None, offset, is_resumable)
                    return self._begin(upload, before, field, quota)
            with before.writing:  # until it is whole
                pass

    def _begin(
        self, upload: Upload, before: Upload | None, field: str, quota: int | None
    ) -> Upload:
        """before: an upload of the same file."""
        digest, size = upload.digest, upload.size
        is_here = digest is not None and self._owns(upload.owner, digest, size)
        held = size if is_here else before.held if before else 0
        if upload.at > held:
            raise InvalidRequest(field, f"{upload.at} is more than the {held} bytes that are here")
        if is_here:
            self._begin_whole(upload, quota)
        elif before:
            before.is_stale = True  # the call that may still be at it ends with its next byte
            upload.part, upload.writing = before.part, before.writing
            self._uploads[self._uploads.index(before)] = upload
        else:
            self._make_room(size + sums_bytes(size) + RECORD_BYTES, upload.owner, quota)
            upload.part = Part(self._scratch / secrets.token_hex(8))
            self._uploads.append(upload)
        return upload

    def _begin_whole(self, upload: Upload, quota: int | None) -> None:
        """All of the file is here: it stays while the call runs."""
        self._shelf.refer([StoredFile("", upload.size, upload.digest or "")])
        self._uploads.append(upload)
        try:
            self._make_room(RECORD_BYTES, upload.owner, quota)
        except (StoreFull, QuotaExceeded):
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
                    self._shelf.refer([file])  # first: nobody may remove the blob once it is there
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
            part.finish(self._shelf.folder)
        except BaseException:
            self.abandon(upload)
            self._shelf.release([file])
            raise
        with self._lock:
            upload.digest, upload.part, upload.is_finishing = file.blake3, None, False
            self._shelf.renewed(file.blake3)

    def _check_whole(self, file: StoredFile) -> None:
        """Errors: DataLoss."""
        blob = self._shelf.open("data", file)
        passes_of(torch.device("cpu")).each(blob.check, range(blob.block_count))

    def leave(self, upload: Upload) -> None:
        """The call that sent a file has ended: what can go on later is held for a while."""
        if not upload.is_resumable:
            self.abandon(upload)
        elif upload.part:
            with upload.writing:  # whoever has taken it over opens it again
                upload.part.rest()
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
                self._shelf.release([StoredFile("", upload.size, upload.digest or "")])
