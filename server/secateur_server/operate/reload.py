"""Files that are read again when they change."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

# How often it is looked whether they have changed: whoever needs what is in them does it.
LOOK_SECONDS = 1.0


class Unusable(Exception):
    """Files that the server cannot work with."""


class Reloaded(Generic[Loaded]):
    """What was in files when they last could be used: what cannot be used changes nothing.

    what: their name in the log.  version: changes when they do.  load: reads them; raises Unusable.
    reloaded: is called with whether they could be used, each time that they have changed.
    Errors: Unusable, at first.
    """

    def __init__(
        self,
        what: str,
        version: Callable[[], object],
        load: Callable[[], Loaded],
        reloaded: Callable[[bool], None],
    ) -> None:
        self._what, self._version, self._load, self._reloaded = what, version, load, reloaded
        self._lock = threading.Lock()
        self._seen = version()  # before they are loaded: they may change meanwhile
        self._value, self._looked = load(), time.monotonic()

    def value(self) -> Loaded:
        """What is in them, as of a moment ago."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._looked = time.monotonic()
                self._look()
            return self._value

    def _look(self) -> None:
        if (version := self._version()) == self._seen:
            return
        self._seen = version
        try:
            self._value = self._load()
        except Unusable as error:
            log.error("the %s stays as it was: %s", self._what, error)
            self._reloaded(False)
        else:
            log.info("read the %s again", self._what)
            self._reloaded(True)
