"""Which checkpoints make room for others."""

import heapq
from collections.abc import Iterator
from itertools import chain

from secateur_server.errors import QuotaExceeded, StoreFull
from secateur_server.storage.accounts import Account, Accounts, Evictable
from secateur_server.storage.references import References, Release

Victim = tuple[Evictable, str]  # and why it is removed: "quota" or "room"


class EvictionPolicy:
    """Keeps a store within its bytes. The store's lock guards it.

    A tenant's own least recently used checkpoints make room first, then those of other tenants
    above their fair share: `max_bytes` divided by the tenants that hold something. No other tenant
    is left with less than that. What a call uses is never removed.

    Args:
        references: Of all blobs.
    """

    def __init__(self, max_bytes: int, holdings: Accounts, references: References) -> None:
        self.max_bytes = max_bytes
        self._accounts, self._references = holdings, references

    @property
    def used_bytes(self) -> int:
        """Bytes of everything that the store keeps."""
        return self._references.bytes + self._accounts.own_bytes

    def check(self, owner: str, count: int, quota: int | None) -> None:
        """Refuses what cannot fit, whatever is removed. Removes nothing, and is cheap.

        Raises:
            QuotaExceeded: It is more than the quota.
            StoreFull: The other tenants' fair shares do not leave that much.
        """
        if quota is not None and count > quota:
            raise _above_quota(count, quota)
        share = self._fair_share(owner)
        others = (a.bytes for a in self._accounts.by_owner.values() if a.owner != owner)
        if sum(min(share, held) for held in others) + count > self.max_bytes:
            raise self._full(count)

    def victims(self, owner: str, count: int, quota: int | None) -> list[Victim]:
        """What to remove so that `count` bytes more of an owner fit.

        Args:
            owner: Whose bytes they are.
            count: How many.
            quota: Bytes that the owner may hold; None is no bound.

        Raises:
            QuotaExceeded, StoreFull: They would not fit without all of that.
        """
        account = self._accounts.get(owner)
        plan, own = _Plan(self._accounts, self._references), account.idle()
        while quota is not None and account.bytes - plan.lost(account) + count > quota:
            victim = next(own, None)
            if victim is None:
                raise _above_quota(count, quota)
            plan.add(victim, "quota")
        candidates = chain(own, self._others(plan, owner))
        while self.used_bytes - plan.freed + count > self.max_bytes:
            victim = next(candidates, None)
            if victim is None:
                raise self._full(count)
            plan.add(victim, "room")
        return plan.victims

    def _fair_share(self, owner: str) -> int:
        return self.max_bytes // len(self._accounts.by_owner.keys() | {owner})

    def _others(self, plan: "_Plan", owner: str) -> Iterator[Evictable]:
        """What other tenants have above their share, the least recently used first."""
        share = self._fair_share(owner)
        others = [a for a in self._accounts.by_owner.values() if a.owner != owner]
        surplus = (_surplus(plan, account, share) for account in others if account.bytes > share)
        return heapq.merge(*surplus, key=lambda holding: holding.used)

    def _full(self, count: int) -> StoreFull:
        return StoreFull(
            "data",
            f"{count} bytes do not fit: the store holds {self.used_bytes} of {self.max_bytes}, and "
            "what is in use or other tenants' fair share is not removed; delete checkpoints",
        )


def _surplus(plan: "_Plan", account: Account, share: int) -> Iterator[Evictable]:
    for holding in account.idle():
        if account.bytes - plan.lost(account, holding) < share:
            return
        yield holding


class _Plan:
    """Victims, and the bytes that their removal frees."""

    def __init__(self, holdings: Accounts, references: References) -> None:
        self.victims: list[Victim] = []
        self._accounts = holdings
        self._store = Release(references)
        self._owners: dict[str, Release] = {}

    @property
    def freed(self) -> int:
        """Bytes on disk."""
        return self._store.freed

    def lost(self, account: Account, holding: Evictable | None = None) -> int:
        """Bytes of an owner's, if `holding` is removed as well."""
        release = self._owners.setdefault(account.owner, Release(account.references))
        return release.freed + (release.frees(holding) if holding else 0)

    def add(self, holding: Evictable, reason: str) -> None:
        """Adds a victim."""
        account = self._accounts.by_owner[holding.owner]
        self._owners.setdefault(holding.owner, Release(account.references)).add(holding)
        self._store.add(holding)
        self.victims.append((holding, reason))


def _above_quota(count: int, quota: int) -> QuotaExceeded:
    return QuotaExceeded(
        "data",
        f"{count} bytes do not fit the {quota} that you may keep; delete checkpoints, or ask the "
        "operator to raise `store` in the tokens file",
    )
