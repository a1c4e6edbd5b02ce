"""Space in the store: reserved before bytes are written, and made by evicting checkpoints."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Condition

from secateur_server.errors import TakenOver
from secateur_server.storage.accounts import Accounts, Entry, Upload
from secateur_server.storage.blob_folder import BlobFolder, Trash
from secateur_server.storage.eviction import EvictionPolicy, Victim
from secateur_server.storage.removal import Removal

log = logging.getLogger(__name__)


@dataclass
class Evicted:
    """Checkpoints and uploads that have been taken out of the index.

    Attributes:
        checkpoints: Each with the reason of its eviction, and the bytes that this frees.
        trash: Their files, to be removed from the disk.
    """

    checkpoints: list[tuple[Entry, str, int]] = field(default_factory=list)
    trash: Trash = field(default_factory=Trash)


class Space:
    """Reserves space in the store, and evicts what has to make way for it.

    Args:
        policy: Chooses what to evict.
        blobs: Of the store.
        accounts: Of all owners.
        removal: Removes what is evicted.
        lock: The store's.
        evicted: Called with the reason of each eviction and the bytes that it freed.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        blobs: BlobFolder,
        accounts: Accounts,
        removal: Removal,
        lock: Condition,
        evicted: Callable[[str, int], None],
    ) -> None:
        self._policy, self._blobs, self._accounts = policy, blobs, accounts
        self._removal, self._lock, self._evicted = removal, lock, evicted

    @property
    def max_bytes(self) -> int:
        """The limit of the store."""
        return self._policy.max_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, with those of staged files that are about to be written."""
        with self._lock:
            return self._policy.used_bytes + self._blobs.removing_bytes

    def check(self, owner: str, count: int, quota: int | None) -> None:
        """Refuses bytes that would not fit after any eviction. The caller has the lock.

        Raises:
            QuotaExceeded: They are more than the quota.
            StoreFull: The other tenants' fair shares do not leave that much.
        """
        self._policy.check(owner, count, quota)

    def reserve(self, owner: str, count: int, quota: int | None) -> Evicted:
        """Counts `count` more bytes of an owner. The caller has the lock.

        Args:
            owner: Whose bytes they are.
            count: Bytes.
            quota: Bytes that the owner may have; None: no limit.

        Returns:
            What was evicted to make space. The caller passes it to `remove`, without the lock.

        Raises:
            StoreFull, QuotaExceeded: The bytes do not fit; nothing is evicted.
        """
        evicted = self.evict(self._policy.victims(owner, count, quota))
        self._accounts.count(owner, count)
        return evicted

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
            evicted = self.reserve(upload.owner, count, upload.quota)
            staged.reserved = size
        try:
            self.remove(evicted)
        except BaseException:
            with self._lock:  # a concurrent removal of the upload has already reset `reserved`
                self._accounts.reserve(upload.owner, staged, -min(count, staged.reserved))
            raise

    def evict(self, victims: Iterable[Victim]) -> Evicted:
        """Takes victims out of the index. The caller has the lock, and calls `remove` later."""
        evicted = Evicted()
        for victim, reason in victims:
            before = self._policy.used_bytes
            if isinstance(victim, Upload):
                self._removal.drop_upload(victim, evicted.trash)
            else:
                self._removal.drop(victim, evicted.trash)
                freed = before - self._policy.used_bytes
                evicted.checkpoints.append((victim, reason, freed))
        return evicted

    def remove(self, evicted: Evicted) -> None:
        """Removes evicted files from the disk. The caller must not have the lock.

        Raises:
            StoreFailed, StoreFull: The disk did not remove the records of some checkpoints.
        """
        try:
            self._removal.finish(evicted.trash)
        finally:
            removed = set(evicted.trash.entries)
            for entry, reason, freed in evicted.checkpoints:
                if entry in removed:
                    log.info("evicted %s (%s): %d bytes", entry.record.name, reason, freed)
                    self._evicted(reason, freed)
        with self._lock:  # blobs that other calls are removing may still be on disk
            self._lock.wait_for(
                lambda: not self._blobs.removing_bytes or self.used_bytes <= self.max_bytes
            )
