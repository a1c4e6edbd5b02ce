"""Removes checkpoints and uploads: from the index with the store's lock, then from the disk.

If the disk does not remove a record, its checkpoint is put back into the index. The next start
would find it, so it is listed, readable and counted until then.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from secateur_server.errors import RequestError, StoreFailed
from secateur_server.runtime.disk import disk_errors
from secateur_server.storage.accounts import Accounts, Entry, Upload
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.folders import FolderLock
from secateur_server.storage.records import (
    StoredFile,
    record_path,
    remove_records,
    write_record,
)

_ADVICE = "retry after the operator has repaired it"
_owner = attrgetter("owner")


class Removal:
    """Removes checkpoints and uploads of a store, whose records are in `folder`."""

    def __init__(
        self, folder: Path, blobs: BlobFolder, accounts: Accounts, folder_lock: FolderLock
    ) -> None:
        self._folder, self._blobs, self._accounts = folder, blobs, accounts
        self._folder_lock, self._lock = folder_lock, accounts.lock

    def count(self, entry: Entry) -> None:
        """Counts a checkpoint, and adds references to its blobs. The caller has the lock."""
        self.acquire(entry.owner, entry.files())
        self._accounts.count_record(entry)

    def acquire(self, owner: str, files: list[StoredFile]) -> None:
        """Adds references of an owner to blobs. The caller has the lock."""
        self._blobs.acquire(files)
        self._accounts.acquire(owner, files)

    def release(self, owner: str, files: list[StoredFile], trash: Trash) -> None:
        """Reverses `acquire`. The caller has the lock, and removes `trash` later."""
        self._accounts.release(owner, files)
        trash.blobs += self._blobs.release(files)

    def drop(self, entry: Entry, trash: Trash) -> None:
        """Takes a checkpoint out of the index. The caller has the lock, and must `finish`."""
        self._accounts.get(entry.owner).remove(entry)
        trash.entries.append(entry)
        self.forget(entry, trash)

    def forget(self, entry: Entry, trash: Trash) -> None:
        """Reverses `count`. The caller has the lock, and must `finish`."""
        self.release(entry.owner, entry.files(), trash)
        self._accounts.forget_record(entry)

    def drop_upload(self, upload: Upload, trash: Trash) -> None:
        """Takes an upload out of the index. The caller has the lock, and removes `trash` later."""
        if not self._accounts.discard(upload):
            return
        if upload.staged:
            trash.staged.append(upload.staged)
            self._accounts.reserve(upload.owner, upload.staged, -upload.staged.reserved)
        else:
            self.release(upload.owner, upload.files(), trash)

    def finish(self, trash: Trash) -> None:
        """Removes files from the disk. The caller must not have the lock.

        Afterwards the entries of `trash` are the checkpoints that have been removed.

        Raises:
            StoreFailed, StoreFull: The disk did not remove the records of some checkpoints. These
                are in the index again.
        """
        failed = self._remove_records(trash.entries)
        if failed:
            self._restore(failed, trash)
        self._blobs.remove(trash)
        _raise_first(failed.values())

    def remove_unreadable(self, owner: str, ident: str) -> None:
        """Removes a damaged record. Raises StoreFailed or StoreFull if the disk does not."""
        _raise_first(self._remove_from(owner, [ident]).values())

    def _remove_records(self, entries: list[Entry]) -> dict[Entry, Exception]:
        failed: dict[Entry, Exception] = {}
        for owner, group in groupby(sorted(entries, key=_owner), _owner):
            by_id = {entry.record.id: entry for entry in group}
            errors = self._remove_from(owner, list(by_id))
            failed |= {by_id[ident]: error for ident, error in errors.items()}
        return failed

    def _remove_from(self, owner: str, idents: list[str]) -> dict[str, Exception]:
        try:
            self._folder_lock.check()
        except StoreFailed as error:
            return dict.fromkeys(idents, error)
        failed = remove_records(self._folder / owner, idents)
        if not failed:
            self.remove_folder(owner)
        return {**failed}

    def remove_folder(self, owner: str) -> None:
        """Removes the folder of an owner without records."""
        with self._lock:  # so that no record is written meanwhile
            account = self._accounts.get(owner)
            if not account.records and self._folder_lock.is_in_place:
                account.is_folder_synced = False
                with suppress(OSError):  # it has a damaged record, or does not exist
                    (self._folder / owner).rmdir()

    def _restore(self, failed: Collection[Entry], trash: Trash) -> None:
        trash.entries = [entry for entry in trash.entries if entry not in failed]
        for entry in failed:
            self._rewrite(entry)
        with self._lock:
            for entry in failed:
                self.count(entry)
            for owner, entries in groupby(failed, _owner):
                self._accounts.get_or_create(owner).restore(entries)
            self._blobs.rescue(trash)

    def _rewrite(self, entry: Entry) -> None:
        """Writes a record again if the disk removed it, but failed to sync the removal."""
        folder = self._folder / entry.owner
        path = record_path(folder, entry.record.id)
        if self._folder_lock.is_in_place and not path.exists():
            with suppress(RequestError, OSError):  # the disk may fail to write, too
                folder.mkdir(mode=0o700, exist_ok=True)
                write_record(folder, entry.record)


def _raise_first(errors: Iterable[Exception]) -> None:
    for error in errors:
        with disk_errors(_ADVICE):
            raise error
