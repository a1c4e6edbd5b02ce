"""How full an object store is, and what is evicted from it."""

from collections.abc import Callable
from typing import NamedTuple

from secateur_server.runtime.context import RequestContext
from secateur_server.storage.accounts import Accounts, Entry
from secateur_server.storage.eviction import EvictionPolicy, Victim
from secateur_server.storage.records import Record
from secateur_server.storage.references import References
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.records import SharedRecords

IsUsed = Callable[[str, Record], bool]


class Usage(NamedTuple):
    """The checkpoints of a store at a moment.

    Attributes:
        accounts: What each owner has.
        references: Of all checkpoints to blobs.
    """

    accounts: Accounts
    references: References

    @property
    def bytes(self) -> int:
        """Bytes of all blobs and records."""
        return self.references.bytes + self.accounts.own_bytes

    @property
    def entries(self) -> list[Entry]:
        """All checkpoints."""
        accounts = self.accounts.by_owner.values()
        return [entry for account in accounts for entry in account.entries.values()]

    def victims(self, owner: str, max_bytes: float, quota: int | None) -> list[Victim]:
        """Chooses what to evict, so that the store and an owner are within their limits.

        Raises:
            StoreFull, QuotaExceeded: Not enough can be evicted.
        """
        most = int(min(max_bytes, 1 << 62))
        policy = EvictionPolicy(most, self.accounts, self.references)
        return policy.victims(owner, 0, quota)


def read_usage(
    context: RequestContext, objects: Objects, records: SharedRecords, is_used: IsUsed
) -> Usage:
    """Reads how full a store is.

    Args:
        context: The request.
        objects: The store.
        records: Its records.
        is_used: Whether a call of this server uses a checkpoint, so that it is not evicted.
    """
    used = {key: found.time for key, found in objects.list(context, "used").items()}
    # Servers that are creating checkpoints may still find that these do not fit.
    creating = {key.rpartition("/")[2] for key in objects.list(context, "claims")}
    usage = Usage(Accounts(), References())
    found = [
        Entry(owner, record, used.get(used_key(owner, record), record.create_time / 1e9))
        for owner, record in records.by_owner(context)
    ]
    for entry in sorted(found, key=lambda each: each.used):
        is_pinned = entry.record.id in creating or is_used(entry.owner, entry.record)
        entry.pins = int(is_pinned)
        usage.references.acquire(entry.files())
        usage.accounts.acquire(entry.owner, entry.files())
        usage.accounts.count_record(entry)
        usage.accounts.get(entry.owner).add(entry)
    return usage


def used_key(owner: str, record: Record) -> str:
    """The key of the object whose time is that of a checkpoint's last use."""
    return f"used/{owner}/{record.id}"
