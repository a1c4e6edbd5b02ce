"""The last uses of checkpoints, in the index and on disk."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from secateur_server.storage.accounts import Accounts, Entry
from secateur_server.storage.clock import Clock
from secateur_server.storage.records import record_path

log = logging.getLogger(__name__)


class LastUses:
    """Records when checkpoints were last used: on disk, as the modification time of the record."""

    def __init__(self, folder: Path, accounts: Accounts, clock: Clock) -> None:
        self._folder, self._accounts, self._clock = folder, accounts, clock

    def touch(self, entry: Entry) -> None:
        """Records that a checkpoint is used now, unless it has been removed."""
        now = self._clock.now()
        with self._accounts.lock:
            account = self._accounts.get(entry.owner)
            if entry.record.id not in account.entries:
                return
            account.touch(entry, now)
        self.write(entry)

    def write(self, entry: Entry) -> None:
        """Writes the last use of a checkpoint to disk, for the next start."""
        used = self._clock.wall(entry.used)
        path = record_path(self._folder / entry.owner, entry.record.id)
        with suppress(OSError):  # the disk may be full, or the record removed
            os.utime(path, (used, used))  # not the kernel's own time of now, which is coarser

    def follow_clock(self) -> None:
        """Writes all last uses again if the system's clock was set."""
        step = self._clock.follow()
        if not step:
            return
        log.warning("the system's clock was set by %+.0f seconds: no age has changed", step)
        with self._accounts.lock:
            accounts = self._accounts.by_owner.values()
            entries = [entry for account in accounts for entry in account.entries.values()]
        for entry in entries:
            self.write(entry)
