"""Chooses the checkpoints to evict when the store needs space."""

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from secateur_server.errors import QuotaExceeded, StoreFull
from secateur_server.storage.accounts import Account, Accounts, Evictable
from secateur_server.storage.blobs import disk_bytes
from secateur_server.storage.references import References

Victim = tuple[Evictable, str]  # with the reason of its eviction: "quota", "room" or "ttl"


class EvictionPolicy:
    """Chooses what to evict so that the store stays within its limit.

    A tenant's own least recently used checkpoints are evicted first, then those of other tenants
    above their fair share, which is `max_bytes` divided by the number of tenants with data. No
    other tenant is left with less than that. Checkpoints in use are never evicted. The store's lock
    guards this object. A quota of None is no limit.

    Args:
        max_bytes: The limit of the store.
        accounts: The accounts of all owners.
        references: The references to all blobs.
    """

    def __init__(self, max_bytes: int, accounts: Accounts, references: References) -> None:
        self.max_bytes = max_bytes
        self._accounts, self._references = accounts, references

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs, records, their folders, and staged files."""
        return self._references.bytes + self._accounts.own_bytes

    def check(self, owner: str, count: int, quota: int | None) -> None:
        """Refuses `count` bytes that would not fit after any eviction. It is cheap.

        Raises:
            QuotaExceeded: They are more than the quota.
            StoreFull: The other tenants' fair shares do not leave that much.
        """
        if quota is not None and count > quota:
            raise _above_quota(count, quota)
        share = self._fair_share(owner)
        others = (a.bytes for a in self._accounts.by_owner.values() if a.owner != owner)
        if sum(min(share, held) for held in others) + count > self.max_bytes:
            raise self._full(count)

    def victims(self, owner: str, count: int, quota: int | None) -> list[Victim]:
        """Chooses what to evict so that `count` more bytes of an owner fit.

        Raises:
            QuotaExceeded: The bytes do not fit the quota.
            StoreFull: The bytes do not fit the store.
        """
        account = self._accounts.get(owner)
        plan, own = _Plan(self._accounts, self._references), account.idle()
        while quota is not None and account.bytes - plan.lost(account) + count > quota:
            victim = next(own, None)
            if victim is None:
                raise _above_quota(count, quota)
            plan.add(victim, "quota")
        candidates = chain(own, self._others(plan, owner))
        while self.used_bytes - plan.store.freed + count > self.max_bytes:
            victim = next(candidates, None)
            if victim is None:
                raise self._full(count)
            plan.add(victim, "room")
        return plan.victims

    def _fair_share(self, owner: str) -> int:
        return self.max_bytes // len(self._accounts.by_owner.keys() | {owner})

    def _others(self, plan: "_Plan", owner: str) -> Iterator[Evictable]:
        """Items of other tenants above their share, the least recently used first."""
        share = self._fair_share(owner)
        others = [a for a in self._accounts.by_owner.values() if a.owner != owner]
        surplus = (_surplus(plan, account, share) for account in others if account.bytes > share)
        return heapq.merge(*surplus, key=lambda item: item.used)

    def _full(self, count: int) -> StoreFull:
        return StoreFull(
            "data",
            f"{count} bytes do not fit: the store uses {self.used_bytes} of {self.max_bytes}, and "
            "checkpoints in use or within other tenants' fair shares are never evicted; delete "
            "checkpoints",
        )


def _surplus(plan: "_Plan", account: Account, share: int) -> Iterator[Evictable]:
    for item in account.idle():
        if account.bytes - plan.lost(account, item) < share:
            return
        yield item


class _Plan:
    """Victims, and the bytes that their eviction frees."""

    def __init__(self, accounts: Accounts, references: References) -> None:
        self.victims: list[Victim] = []
        self._accounts = accounts
        self.store = _Release(references)
        self._owners: dict[str, _Release] = {}

    def lost(self, account: Account, item: Evictable | None = None) -> int:
        """Bytes that an owner loses, if `item` is evicted as well."""
        release = self._release_of(account)
        return release.freed + (release.frees(item) if item else 0)

    def add(self, item: Evictable, reason: str) -> None:
        """Adds a victim."""
        self._release_of(self._accounts.by_owner[item.owner]).add(item)
        self.store.add(item)
        self.victims.append((item, reason))

    def _release_of(self, account: Account) -> "_Release":
        return self._owners.setdefault(account.owner, _Release(account.references))


class _Release:
    """The effect of releasing references, computed without releasing them.

    Attributes:
        freed: Bytes on disk that the release of all added items frees.
    """

    def __init__(self, references: References) -> None:
        self.freed = 0
        self._references = references
        self._released = Counter[str]()

    def frees(self, item: Evictable) -> int:
        """Bytes that the release of one more item frees."""
        files = {file.blake3: file.size for file in item.files()}
        counts = Counter(file.blake3 for file in item.files())  # it may have a file twice
        return item.own_bytes + sum(
            disk_bytes(files[digest])
            for digest, count in counts.items()
            if self._released[digest] + count == self._references.count(digest)
        )

    def add(self, item: Evictable) -> None:
        """Adds an item to the release."""
        self.freed += self.frees(item)
        self._released.update(file.blake3 for file in item.files())


def _above_quota(count: int, quota: int) -> QuotaExceeded:
    return QuotaExceeded(
        "data",
        f"{count} bytes do not fit this tenant's quota of {quota}; delete checkpoints, or ask the "
        "operator to raise `store` in the tokens file",
    )
