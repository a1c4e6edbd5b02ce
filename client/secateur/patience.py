"""How long, and how often, a call that failed is made again."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from secateur.errors import ServerBusy, Unavailable

Answer = TypeVar("Answer")

# Tries that brought nothing before a caller without a timeout is told, and the pause behind the
# first: about 45 s in all, in which a server that was killed is there again.
TRIES = 16
PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 5.0
# How often a caller without a timeout sends its model again to a server that has no memory for it:
# such a server receives the model before it fails, and may never have enough.
MOST_RESENDS = 5


class Patience:
    """The time of one call of a method, of however many calls to the server it is made.

    timeout: seconds; None has no end.
    """

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._resends = 0

    def left(self) -> float | None:
        """Seconds that are left."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def at_least(self, seconds: float) -> "Patience":
        """The time that is left, or so many seconds if that is more."""
        left = self.left()
        return Patience(None if left is None else max(left, seconds))

    def is_over(self, tries: int) -> bool:
        """Whether so many tries are enough: where there is a timeout it says so itself."""
        return self._end is None and tries >= TRIES

    def pause(self, tries: int) -> bool:
        """Waits, the longer the more often; False where no time is left."""
        most = min(MOST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** (tries - 1))
        return self._sleep(most * random.uniform(0.5, 1.0))  # not all callers at once

    def wait_for(self, busy: ServerBusy) -> bool:
        """Waits until a busy server wants the call again.

        Returns:
            False, without a wait, where the server does not say when, where no time is left, or
            where the server was out of memory too often.
        """
        if busy.retry_after is None:
            return False
        if busy.reason == "OUT_OF_MEMORY":
            self._resends += 1
            if self._end is None and self._resends > MOST_RESENDS:
                return False
        # The server's word, and up to a half more: not all callers at once.
        return self._sleep(busy.retry_after * random.uniform(1.0, 1.5))

    def until_served(
        self, attempt: Callable[[float | None], Answer], is_known: bool, is_safe: bool
    ) -> Answer:
        """What `attempt` returns, which is called with the seconds that are left.

        It is called again when a busy server says so, and after the pause that it asks for; and
        when the connection breaks, where `is_known`: a server that was never there is no
        connection that broke, and where `is_safe`: it may have been served without our knowing.
        Errors: SecateurError, the last one.
        """
        tries = 0
        while True:
            try:
                return attempt(self.left())
            except ServerBusy as error:
                if not self.wait_for(error):
                    raise
            except Unavailable:
                tries += 1
                if not (is_known and is_safe) or self.is_over(tries) or not self.pause(tries):
                    raise

    def _sleep(self, seconds: float) -> bool:
        left = self.left()
        if left is not None and left <= seconds:
            return False
        time.sleep(seconds)
        return True
