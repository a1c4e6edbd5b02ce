"""Makes space in the store by evicting checkpoints, before bytes are written."""

import logging
from collections.abc import Callable, Iterable

from secateur_server.errors import TakenOver
from secateur_server.storage.accounts import Accounts, Upload
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.eviction import EvictionPolicy, Victim
from secateur_server.storage.removal import Removal

log = logging.getLogger(__name__)


class Space:
    """Makes space in the store.

    Args:
        policy: Chooses what to evict.
        blobs: The blobs of the store.
        accounts: The accounts of all owners.
        removal: Removes what is evicted.
        evicted: Called with the reason of each eviction and the bytes that it freed.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        blobs: BlobFolder,
        accounts: Accounts,
        removal: Removal,
        evicted: Callable[[str, int], None],
    ) -> None:
        self.policy, self._blobs, self._accounts = policy, blobs, accounts
        self._removal, self._evicted, self._lock = removal, evicted, accounts.lock

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those of staged files that are about to be written."""
        with self._lock:
            return self.policy.used_bytes + self._blobs.removing_bytes

    def make_way(self, owner: str, count: int, quota: int | None) -> Trash:
        """Evicts until `count` more bytes of an owner fit. The caller has the lock.

        Returns:
            The files of what was evicted. The caller counts the bytes, and passes this to `remove`
            without the lock.

        Raises:
            StoreFull, QuotaExceeded: The bytes do not fit; nothing is evicted.
        """
        return self.evict(self.policy.victims(owner, count, quota))

    def reserve_staged(self, upload: Upload, size: int) -> None:
        """Makes space so that the staged file of an upload may take `size` bytes on disk.

        Raises:
            StoreFull, QuotaExceeded: The bytes do not fit.
            StoreFailed: The disk failed.
            TakenOver: The upload has been removed or taken over.
        """
        self._blobs.check_folder()
        staged = upload.staged
        with self._lock:
            if staged is None or upload not in self._accounts.get(upload.owner).uploads:
                raise TakenOver("header", "another call of this caller has taken over the upload")
            count = size - staged.reserved
            trash = self.make_way(upload.owner, count, upload.quota)
            self._accounts.reserve(upload.owner, staged, count)
        try:
            self.remove(trash)
        except BaseException:
            with self._lock:  # a concurrent removal of the upload has already reset `reserved`
                self._accounts.reserve(upload.owner, staged, -min(count, staged.reserved))
            raise

    def evict(self, victims: Iterable[Victim]) -> Trash:
        """Takes victims out of the index. The caller has the lock, and calls `remove` later."""
        trash = Trash()
        for victim, reason in victims:
            before = self.policy.used_bytes
            if isinstance(victim, Upload):
                self._removal.drop_upload(victim, trash)
            else:
                self._removal.drop(victim, trash)
                trash.evicted.append((victim, reason, before - self.policy.used_bytes))
        return trash

    def remove(self, trash: Trash) -> None:
        """Removes evicted files from the disk. The caller must not have the lock.

        Raises:
            StoreFailed, StoreFull: The disk did not remove the records of some checkpoints.
        """
        try:
            self._removal.finish(trash)
        finally:
            removed = set(trash.entries)
            for entry, reason, freed in trash.evicted:
                if entry in removed:
                    log.info("evicted %s (%s): %d bytes", entry.record.name, reason, freed)
                    self._evicted(reason, freed)
        with self._lock:  # blobs that other calls are removing may still be on disk
            self._lock.wait_for(
                lambda: not self._blobs.removing_bytes or self.used_bytes <= self.policy.max_bytes
            )
