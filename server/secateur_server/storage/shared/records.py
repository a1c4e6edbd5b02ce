"""The records of an object store. They never change, so each is read once."""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator

from secateur_server.errors import CheckpointNotFound, DataLoss, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.records import PREFIX, Record, decode_record
from secateur_server.storage.shared.objects import Objects

# Records that are kept in memory: some 500 bytes each.
KEPT_RECORDS = 200_000

_ID = re.compile("[0-9a-f]{32}")


class SharedRecords:
    """The records of all owners."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Record] = OrderedDict()

    def get(self, context: RequestContext, owner: str, name: str) -> Record:
        """Reads the record of a checkpoint, to see that it exists.

        Raises:
            CheckpointNotFound: The owner has no checkpoint of that name.
            DataLoss: It is damaged.
            StoreFailed: The store failed.
        """
        ident = name.removeprefix(PREFIX)
        is_name = name.startswith(PREFIX) and _ID.fullmatch(ident)
        record = self._read(context, owner, ident) if is_name else None
        if record is None:
            raise CheckpointNotFound(
                "checkpoint",
                f"{quote(name)} does not exist: it may have been deleted, evicted or expired, or "
                "belong to another token",
            )
        return record

    def _read(self, context: RequestContext, owner: str, ident: str) -> Record | None:
        data = self._objects.read(context, record_key(owner, ident))
        if data is None:
            return None
        record = decode_record(ident, data)
        with self._lock:
            self._kept[owner, ident] = record
            while len(self._kept) > KEPT_RECORDS:
                self._kept.popitem(last=False)
        return record

    def idents(self, context: RequestContext, owner: str) -> list[str]:
        """Lists the ids of an owner's checkpoints, the oldest first."""
        listed = self._objects.list(context, f"records/{owner}")
        return sorted(key.rpartition("/")[2].removesuffix(".json") for key in listed)

    def some(self, context: RequestContext, owner: str, idents: list[str]) -> list[Record]:
        """Returns the records of some ids that still exist and are not damaged."""
        found = (self._known(context, owner, ident) for ident in idents)
        return [record for record in found if record is not None]

    def by_owner(self, context: RequestContext) -> Iterator[tuple[str, Record]]:
        """Yields the owner and the record of each checkpoint that is listed."""
        for key in self._objects.list(context, "records"):
            _, owner, filename = key.split("/")
            record = self._known(context, owner, filename.removesuffix(".json"))
            if record is not None:
                yield owner, record

    def all(self, context: RequestContext) -> Iterator[Record]:
        """Yields all records.

        Raises:
            DataLoss: One is damaged, so that its blobs are unknown.
        """
        for key in self._objects.list(context, "records"):
            _, owner, filename = key.split("/")
            ident = filename.removesuffix(".json")
            record = self._kept.get((owner, ident)) or self._read(context, owner, ident)
            if record is not None:
                yield record

    def _known(self, context: RequestContext, owner: str, ident: str) -> Record | None:
        try:
            return self._kept.get((owner, ident)) or self._read(context, owner, ident)
        except DataLoss:
            return None


def record_key(owner: str, ident: str) -> str:
    """The key of a record."""
    return f"records/{owner}/{ident}.json"
