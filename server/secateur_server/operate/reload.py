"""Files that are reread when they change."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from blake3 import blake3

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

# The shortest interval between checks for changes. The thread that needs the value checks.
CHECK_SECONDS = 1.0


class Unusable(Exception):
    """A file that the server cannot use."""


class Reloaded(Generic[Loaded]):
    """The value of files, which is replaced when they change. Unusable files change nothing.

    Args:
        what: The name of the files in the log.
        paths: The files.
        load: Reads the files. Raises Unusable.
        reloaded: Called each time that the files have changed, with whether they could be used.

    Raises:
        Unusable: The files cannot be used at the start.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        load: Callable[[], Loaded],
        reloaded: Callable[[bool], None],
    ) -> None:
        self._what, self._paths, self._load, self._reloaded = what, paths, load, reloaded
        self._lock = threading.Lock()
        self._seen = self._digests()  # before loading, since the files may change meanwhile
        self._value, self._checked = load(), time.monotonic()

    def value(self) -> Loaded:
        """The current value, at most CHECK_SECONDS old."""
        with self._lock:
            if time.monotonic() - self._checked >= CHECK_SECONDS:
                self._checked = time.monotonic()
                self._check()
            return self._value

    def _digests(self) -> list[bytes | None]:
        return [_digest(path) for path in self._paths]

    def _check(self) -> None:
        if (digests := self._digests()) == self._seen:
            return
        self._seen = digests
        try:
            self._value = self._load()
        except Unusable as error:
            log.error("cannot reread the %s, keeping the previous one: %s", self._what, error)
            self._reloaded(False)
        else:
            log.info("reread the %s", self._what)
            self._reloaded(True)


def _digest(path: Path) -> bytes | None:
    """The digest of a file, whose content may be secret; None if it cannot be read."""
    try:
        return blake3(path.read_bytes()).digest()
    except OSError:  # `load` reports it
        return None
