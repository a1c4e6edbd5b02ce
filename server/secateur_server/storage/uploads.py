"""Uploads: files that callers send, in one call or several, or that the server makes."""

import secrets
from itertools import islice
from pathlib import Path

import torch

from secateur_server.backends import backend_for
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
from secateur_server.storage.blobs import disk_bytes
from secateur_server.storage.clock import Clock
from secateur_server.storage.records import StoredFile
from secateur_server.storage.removal import Removal
from secateur_server.storage.space import Space
from secateur_server.storage.staged_file import StagedFile

# Seconds that a broken upload is kept after its last byte.
UPLOAD_SECONDS = 3600.0

# Limits the files of one model, and the broken uploads of one tenant.
MAX_FILES = 10_000


class Uploads:
    """The uploads of all callers, whose staged files are in the folder `scratch`."""

    def __init__(
        self,
        blobs: BlobFolder,
        accounts: Accounts,
        removal: Removal,
        space: Space,
        scratch: Path,
        clock: Clock,
    ) -> None:
        self._blobs, self._accounts, self._removal = blobs, accounts, removal
        self._space, self._scratch, self._clock = space, scratch, clock
        self._lock = accounts.lock

    def expire(self) -> None:
        """Removes broken uploads that nobody has resumed for UPLOAD_SECONDS."""
        oldest = self._clock.now() - UPLOAD_SECONDS
        for upload in self._all():
            if not upload.is_active and upload.used < oldest:
                self.abandon(upload)

    def close(self) -> None:
        """Removes all uploads."""
        for upload in self._all():
            self.abandon(upload)

    def _all(self) -> list[Upload]:
        with self._lock:
            accounts = self._accounts.by_owner.values()
            return [upload for account in accounts for upload in account.uploads]

    def received(self, owner: str, digest: str, size: int) -> int:
        """The number of bytes of a file that `owner` has uploaded already.

        Reads the data of this owner alone, so that its time tells nothing about other owners.
        """
        if self._has_whole(owner, digest, size):
            return size
        with self._lock:
            upload = self._accounts.get(owner).unfinished.get((digest, size))
            return upload.received if upload else 0

    def _has_whole(self, owner: str, digest: str, size: int) -> bool:
        """Whether a checkpoint or an upload of `owner` has the complete, undamaged file."""
        with self._lock:
            is_used = self._accounts.get(owner).references.has(digest, size)
        return is_used and self._blobs.has(digest, size)  # without the lock: it reads the disk

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
        """Begins to receive a file, or the rest of it. Evicts nothing before its bytes arrive.

        Args:
            owner: The owner of the file.
            size: Bytes of the whole file.
            digest: Hex BLAKE3, if the caller announced it.
            offset: The first byte that the caller sends.
            field: The field of the request that has the offset, for errors.
            is_resumable: Whether the received bytes are kept if the call breaks.
            quota: Bytes that the owner may have; None: no limit.

        Raises:
            InvalidRequest: The store has fewer bytes than `offset`.
            StoreFull, QuotaExceeded: The file would not fit.
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
            with before.writing:  # wait until it is complete
                pass

    def _begin(self, upload: Upload, before: Upload | None, is_whole: bool, field: str) -> None:
        """Registers an upload. The caller has the lock.

        `before` is an unfinished upload of the same file. `is_whole` says whether the owner had the
        complete file before the lock was taken.
        """
        references = self._accounts.get(upload.owner).references
        is_whole = is_whole and references.has(upload.digest or "", upload.size)
        received = upload.size if is_whole else before.received if before else 0
        if upload.position > received:
            raise InvalidRequest(
                field,
                f"{upload.position} is larger than the {received} bytes that the server has; send "
                "the file from there on",
            )
        if is_whole:
            self._removal.acquire(upload.owner, upload.files())
        elif before:
            before.is_taken_over = True  # the older call ends with its next byte
            self._accounts.discard(before)
            upload.staged, upload.writing = before.staged, before.writing
        else:
            needed = disk_bytes(upload.size) + 2 * DISK_BLOCK  # at least, for a record in a folder
            self._space.policy.check(upload.owner, needed, upload.quota)
            upload.staged = StagedFile(self._scratch / secrets.token_hex(8))
        self._accounts.add(upload)

    def write(self, upload: Upload, data: bytes | memoryview) -> None:
        """Writes the next bytes of a file, but for those that the store has.

        Raises:
            StoreFull, QuotaExceeded: They do not fit.
            StoreFailed: The disk failed.
            TakenOver: A newer call has taken over the upload.
        """
        with upload.writing:  # two calls never mix their bytes
            _check_not_taken_over(upload)
            known = min(upload.received - upload.position, len(data))
            upload.position += len(data)
            upload.used = self._clock.now()
            if known == len(data):
                return
            assert upload.staged is not None, "a complete file has no missing bytes"
            new = memoryview(data)[known:]
            self._space.reserve_staged(upload, disk_bytes(upload.staged.size + len(new)))
            try:
                upload.staged.write(new)
            except BaseException:  # the content of the staged file is unknown now
                self.abandon(upload)
                raise

    def finish(self, context: RequestContext, upload: Upload, filename: str) -> StoredFile:
        """Completes a file, and syncs it to disk.

        Raises:
            InvalidStateDict: The file does not have the announced digest.
            StoreFull, StoreFailed: The disk failed.
            TakenOver: A newer call has taken over the upload.
            DataLoss: The store had the file already, and it is damaged.
        """
        try:
            with upload.writing:  # an older call may still write a last byte
                _check_not_taken_over(upload)
                file = _stored_file(upload, filename)
                if upload.staged:
                    self._finish_staged(upload, upload.staged, file)
                    return file
            self._check_whole(context, file)  # the caller may delete its own copy now
        except (InvalidStateDict, DataLoss):
            self.abandon(upload)
            raise
        return file

    def _finish_staged(self, upload: Upload, staged: StagedFile, file: StoredFile) -> None:
        with self._lock:
            self._blobs.wait_until_removed(file.blake3)
            _check_not_taken_over(upload)
            upload.is_finishing = True
            # Before the blob exists, so that nobody removes it.
            self._removal.acquire(upload.owner, [file])
            self._accounts.reserve(upload.owner, staged, -staged.reserved)
        try:
            self._blobs.put(staged)
        except BaseException:
            self.abandon(upload)
            trash = Trash()
            with self._lock:
                self._removal.release(upload.owner, [file], trash)
            self._blobs.remove(trash)
            raise
        with self._lock:
            self._accounts.finished(upload)
            upload.digest, upload.staged, upload.is_finishing = file.blake3, None, False
            self._blobs.mark_repaired(file.blake3)

    def _check_whole(self, context: RequestContext, file: StoredFile) -> None:
        blob = self._blobs.open("data", file)
        backend_for(torch.device("cpu")).map(context, blob.check, range(blob.block_count))

    def leave(self, upload: Upload) -> None:
        """Ends a call's use of an upload. A resumable one is kept for a later call."""
        if not upload.is_resumable or not upload.received:
            self.abandon(upload)
        elif upload.staged:
            try:
                with upload.writing:  # a newer call opens the file again
                    upload.staged.suspend()
            except (StoreFailed, StoreFull, TakenOver):
                self.abandon(upload)
        upload.is_active = False
        self._remove_excess(upload.owner)

    def _remove_excess(self, owner: str) -> None:
        """Removes the oldest broken uploads of a tenant with more than MAX_FILES."""
        with self._lock:
            uploads = self._accounts.get(owner).uploads
            too_many = list(islice(uploads, max(0, len(uploads) - MAX_FILES)))
        for upload in too_many:
            if not upload.is_active:
                self.abandon(upload)

    def abandon(self, upload: Upload) -> None:
        """Removes an upload."""
        trash = Trash()
        with self._lock:
            self._removal.drop_upload(upload, trash)
        self._blobs.remove(trash)


def _check_not_taken_over(upload: Upload) -> None:
    if upload.is_taken_over:
        raise TakenOver("header", "another call of this caller has taken over the upload")


def _stored_file(upload: Upload, filename: str) -> StoredFile:
    """The file that an upload becomes. Raises InvalidStateDict if its digest is wrong."""
    found = upload.staged.digest() if upload.staged else upload.digest or ""
    if upload.digest not in (None, found):
        raise InvalidStateDict(
            "data", f"{quote(filename)} has the BLAKE3 {found}, announced was {upload.digest}"
        )
    return StoredFile(filename, upload.size, found)
