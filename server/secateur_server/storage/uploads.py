"""Files on their way into the store: sent by callers in several calls, or made by the server."""

import secrets
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from threading import Condition

import torch

from secateur_server.backends import passes_of
from secateur_server.errors import (
    DataLoss,
    InvalidRequest,
    InvalidStateDict,
    StoreFailed,
    StoreFull,
    TakenOver,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.disk import DISK_BLOCK
from secateur_server.storage.accounts import Accounts, Upload
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.blobs import StagedFile, disk_bytes
from secateur_server.storage.clock import Clock
from secateur_server.storage.eviction import EvictionPolicy
from secateur_server.storage.records import StoredFile

# How long what an upload left behind is held, from the last byte on.
UPLOAD_SECONDS = 3600.0

# The most files of one model, and the most of one tenant that wait for a call to go on with them.
MAX_FILES = 10_000


class Uploads:
    """The uploads of all callers.

    Args:
        scratch: A folder for what is not whole.
        reserve: Makes room for an upload to take so many bytes on disk; raises StoreFull,
            QuotaExceeded and TakenOver.
    """

    def __init__(
        self,
        shelf: BlobFolder,
        holdings: Accounts,
        room: EvictionPolicy,
        scratch: Path,
        lock: Condition,
        clock: Clock,
        reserve: Callable[[Upload, int], None],
    ) -> None:
        self._blobs, self._accounts, self._policy = shelf, holdings, room
        self._scratch, self._lock, self._clock, self._reserve = scratch, lock, clock, reserve

    def expire(self) -> None:
        """Lets go what nobody has gone on with for too long."""
        with self._lock:
            oldest = self._clock.now() - UPLOAD_SECONDS
            uploads = [u for a in self._accounts.by_owner.values() for u in a.uploads]
            old = [u for u in uploads if not u.is_active and u.used < oldest]
        for upload in old:
            self.abandon(upload)

    def close(self) -> None:
        """Leaves nothing of any."""
        for account in list(self._accounts.by_owner.values()):
            for upload in list(account.uploads):
                self.abandon(upload)

    def held(self, owner: str, digest: str, size: int) -> int:
        """How many bytes there are of a file that `owner` has sent, or has stored.

        It looks at nothing but what is this owner's: what others have cannot be told from nothing.
        """
        if self._has_whole(owner, digest, size):
            return size
        with self._lock:
            upload = self._accounts.get(owner).unfinished.get((digest, size))
            return upload.held if upload else 0

    def _has_whole(self, owner: str, digest: str, size: int) -> bool:
        """Whether a checkpoint or an upload of `owner` has a file, and nothing is against it."""
        with self._lock:
            is_used = self._accounts.get(owner).references.has(digest, size)
        return is_used and self._blobs.has(digest, size)  # which reads the disk

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
        """Takes a file, or what is missing of it. Nothing is removed for it before its bytes come.

        offset: what the caller does not send.  field: of the request, which has it.
        is_resumable: whether what has come outlasts the call.
        quota: bytes that the owner may have here; None is no bound.
        Errors: InvalidRequest, StoreFull, QuotaExceeded.
        """
        now = self._clock.now()
        upload = Upload(owner, size, digest, None, offset, is_resumable, quota, now)
        while True:
            is_whole = digest is not None and self._has_whole(owner, digest, size)
            with self._lock:
                unfinished = self._accounts.get(owner).unfinished
                before = unfinished.get((digest, size)) if is_resumable else None
                if before is None or not before.is_finishing:
                    self._begin(upload, before, is_whole, field)
                    return upload
            with before.writing:  # until it is whole
                pass

    def _begin(self, upload: Upload, before: Upload | None, is_whole: bool, field: str) -> None:
        """before: an upload of the same file.  is_whole: whether all of it was here just now."""
        references = self._accounts.get(upload.owner).references
        is_whole = is_whole and references.has(upload.digest or "", upload.size)
        held = upload.size if is_whole else before.held if before else 0
        if upload.at > held:
            raise InvalidRequest(field, f"{upload.at} is more than the {held} bytes that are here")
        if is_whole:
            self._acquire(upload)
        elif before:
            before.is_stale = True  # the call that may still be at it ends with its next byte
            self._accounts.discard(before)
            upload.part, upload.writing = before.part, before.writing
        else:
            missing = disk_bytes(upload.size) + DISK_BLOCK  # a record has one or more
            self._policy.check(upload.owner, missing, upload.quota)
            upload.part = StagedFile(self._scratch / secrets.token_hex(8))
        self._accounts.add(upload)

    def _acquire(self, upload: Upload, file: StoredFile | None = None) -> None:
        files = [file] if file else upload.files()
        self._blobs.acquire(files)
        self._accounts.acquire(upload.owner, files)

    def write(self, upload: Upload, data: bytes | memoryview) -> None:
        """The next bytes of a file.  Errors: StoreFull, StoreFailed, QuotaExceeded, TakenOver."""
        with upload.writing:  # two calls at one upload never mix their bytes
            self._check_mine(upload)
            known = min(upload.held - upload.at, len(data))
            upload.at += len(data)
            upload.used = self._clock.now()
            if known == len(data):
                return
            assert upload.part is not None, "what is whole takes no more"
            new = memoryview(data)[known:]
            self._reserve(upload, disk_bytes(upload.part.size + len(new)))
            try:
                upload.part.write(new)
            except BaseException:  # what is in the part now is not known
                self.abandon(upload)
                raise

    def _check_mine(self, upload: Upload) -> None:
        if upload.is_stale:
            raise TakenOver("header", "another call of the same caller sends this file")

    def finish(self, context: RequestContext, upload: Upload, filename: str) -> StoredFile:
        """Makes a file whole, on disk.

        Errors: InvalidStateDict, StoreFull, StoreFailed, TakenOver; DataLoss, where what was there
        has changed.
        """
        try:
            with upload.writing:  # whom it was taken from may still be at a last byte
                self._check_mine(upload)
                file = _becomes(upload, filename)
                if upload.part:
                    self._finish_part(upload, upload.part, file)
                    return file
            self._check_whole(context, file)  # the caller may throw away what it has
        except (InvalidStateDict, DataLoss):
            self.abandon(upload)
            raise
        return file

    def _finish_part(self, upload: Upload, part: StagedFile, file: StoredFile) -> None:
        with self._lock:
            self._blobs.wait_until_removed(file.blake3)
            self._check_mine(upload)
            upload.is_finishing = True
            self._acquire(upload, file)  # first: nobody may remove the blob once it is there
            self._accounts.reserve(upload.owner, part, -part.reserved)
        try:
            self._blobs.put(part)
        except BaseException:
            self.abandon(upload)
            self._release(upload.owner, file)
            raise
        with self._lock:
            self._accounts.finished(upload)
            upload.digest, upload.part, upload.is_finishing = file.blake3, None, False
            self._blobs.renewed(file.blake3)

    def _release(self, owner: str, file: StoredFile) -> None:
        with self._lock:
            self._accounts.release(owner, [file])
            unused = self._blobs.release([file])
        self._blobs.remove(Trash(blobs=unused))

    def _check_whole(self, context: RequestContext, file: StoredFile) -> None:
        """Errors: DataLoss."""
        blob = self._blobs.open("data", file)
        passes_of(torch.device("cpu")).map(context, blob.check, range(blob.block_count))

    def leave(self, upload: Upload) -> None:
        """The call that sent a file has ended: what can go on later is held for a while."""
        if not upload.is_resumable or not upload.held:
            self.abandon(upload)
        elif upload.part:
            try:
                with upload.writing:  # whoever has taken it over opens it again
                    upload.part.rest()
            except (StoreFailed, StoreFull, TakenOver):
                self.abandon(upload)
        upload.is_active = False
        self._bound(upload.owner)

    def _bound(self, owner: str) -> None:
        """Keeps what waits to go on within MAX_FILES of a tenant."""
        with self._lock:
            uploads = self._accounts.get(owner).uploads
            too_many = list(islice(uploads, max(0, len(uploads) - MAX_FILES)))
        for upload in too_many:
            if not upload.is_active:
                self.abandon(upload)

    def abandon(self, upload: Upload) -> None:
        """Leaves nothing of an upload."""
        trash = Trash()
        with self._lock:
            self.drop(upload, trash)
        self._blobs.remove(trash)

    def drop(self, upload: Upload, trash: Trash) -> None:
        """Takes an upload out of the index, with the lock."""
        if not self._accounts.discard(upload):
            return
        if upload.part:
            trash.parts.append(upload.part)
            self._accounts.reserve(upload.owner, upload.part, -upload.part.reserved)
        else:
            self._accounts.release(upload.owner, upload.files())
            trash.blobs += self._blobs.release(upload.files())


def _becomes(upload: Upload, filename: str) -> StoredFile:
    """Errors: InvalidStateDict, where the file is not what was announced."""
    found = upload.part.digest() if upload.part else upload.digest or ""
    if upload.digest not in (None, found):
        raise InvalidStateDict(
            "data", f"{quote(filename)} has the BLAKE3 {found}, announced {upload.digest}"
        )
    return StoredFile(filename, upload.size, found)
