"""Removes blobs that no record names, beside servers that are about to write such records.

A server that relies on a blob first writes a claim, and then reads whether the blob is about to be
removed. A server that removes a blob first says so, and then reads whether the blob is claimed or
named. Stores show what is written at once, so at least one of the two sees the other.
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from secateur_server.errors import RequestError, StoreFailed
from secateur_server.runtime.context import RequestContext
from secateur_server.storage.shared.objects import Objects
from secateur_server.storage.shared.records import SharedRecords

# Seconds after which a claim, or a removal, counts as that of a server that has ended.
LEASE_SECONDS = 600.0
# Seconds between renewals of a claim, and seconds that a removal may take.
RENEW_SECONDS, REMOVE_SECONDS = 60.0, 300.0
# Seconds between questions whether a removal has ended.
POLL_SECONDS = 0.2


class Claim:
    """A claim of some blobs, which is renewed while it is used."""

    def __init__(self, objects: Objects, digests: Iterable[str], ident: str) -> None:
        self._objects = objects
        self._keys = [f"claims/{digest}/{ident}" for digest in dict.fromkeys(digests)]

    def write(self, context: RequestContext) -> None:
        """Writes the claim, or renews it."""
        for key in self._keys:
            self._objects.write(context, key)
        self._written = time.monotonic()

    def renew(self, context: RequestContext) -> None:
        """Renews the claim now and then."""
        if time.monotonic() > self._written + RENEW_SECONDS:
            self.write(context)

    def end(self) -> None:
        """Removes the claim. One that cannot be removed ends by itself."""
        with suppress(RequestError):
            for key in self._keys:
                self._objects.remove(RequestContext(), key)


@contextmanager
def claimed(
    context: RequestContext, objects: Objects, digests: Sequence[str], ident: str
) -> Iterator[Claim]:
    """Claims blobs for a block: none that exists within it is removed.

    Args:
        context: The request.
        objects: The store.
        digests: Of the blobs.
        ident: Of the checkpoint that will name them.

    Raises:
        StoreFailed: The store failed, or a removal does not end.
    """
    claim = Claim(objects, digests, ident)
    try:
        claim.write(context)
        for digest in digests:
            _wait_until_not_removed(context, objects, digest)
        yield claim
    finally:
        claim.end()


def _wait_until_not_removed(context: RequestContext, objects: Objects, digest: str) -> None:
    end = time.monotonic() + LEASE_SECONDS
    while _is_held(context, objects, f"removing/{digest}"):
        if time.monotonic() > end:
            raise StoreFailed("checkpoint", f"the removal of blob {digest} does not end")
        context.check()
        time.sleep(POLL_SECONDS)


def remove_unnamed(
    context: RequestContext, objects: Objects, records: SharedRecords, digests: Iterable[str]
) -> list[str]:
    """Removes those of some blobs that no record names, and no server claims.

    Args:
        context: The request.
        objects: The store.
        records: Its records.
        digests: Of the blobs.

    Returns:
        The digests of those that were removed.

    Raises:
        DataLoss: A record is damaged, so that its blobs are unknown.
        StoreFailed: The store failed.
    """
    begin, token = time.monotonic(), secrets.token_hex(8)
    digests = list(dict.fromkeys(digests))
    removed = []
    try:
        for digest in digests:
            objects.write(context, f"removing/{digest}/{token}")
        free = {digest for digest in digests if not _is_held(context, objects, f"claims/{digest}")}
        if free:
            free -= {file.blake3 for record in records.all(context) for file in record.blobs()}
        for digest in free:
            if time.monotonic() < begin + REMOVE_SECONDS:  # else a claim may not have waited
                objects.remove(context, f"blobs/{digest}")
                removed.append(digest)
    finally:
        for digest in digests:
            objects.remove(context, f"removing/{digest}/{token}")
    return removed


def _is_held(context: RequestContext, objects: Objects, prefix: str) -> bool:
    """Whether a server that has not ended has written an object there."""
    oldest = time.time() - LEASE_SECONDS
    return any(found.time > oldest for found in objects.list(context, prefix).values())
