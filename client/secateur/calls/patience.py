"""How long, and how often, the client repeats a call that failed."""

import random
import time
from collections.abc import Callable

from secateur.errors import SecateurError, ServerBusy

# Tries in a row without progress, after which a call without a timeout fails. The pauses between
# them take about 45 s, in which a server that was killed has started again.
TRIES = 16
PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 5.0
# How often a call without a timeout sends a model again to a server without memory for it: such a
# server receives the model before it fails, and may never have enough.
MOST_RESENDS = 5


class Patience:
    """The time of one call of a method, which may make several calls to the server.

    Attributes:
        tries: Calls that failed since there was progress.
    """

    def __init__(self, timeout: float | None) -> None:
        """Starts the time.

        Args:
            timeout: Seconds; None is no limit.
        """
        self._end = None if timeout is None else time.monotonic() + timeout
        self._resends = 0
        self.tries = 0

    def left(self) -> float | None:
        """Returns the remaining seconds."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def at_least(self, seconds: float) -> "Patience":
        """Returns a Patience with the remaining time, but at least this many seconds."""
        left = self.left()
        return Patience(None if left is None else max(left, seconds))

    def pause_after(
        self, error: SecateurError, is_passing: Callable[[SecateurError], bool]
    ) -> float | None:
        """Decides whether a call is repeated.

        Args:
            error: Why it failed.
            is_passing: Whether it may succeed after an error. After ServerBusy it is repeated in
                any case.

        Returns:
            The seconds to wait before; None if it is time to give up.
        """
        if isinstance(error, ServerBusy):
            return self._pause_of_busy(error)
        self.tries += 1
        is_over = self._end is None and self.tries >= TRIES
        if is_over or not is_passing(error):
            return None
        most = min(MOST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** (self.tries - 1))
        return self._in_time(most * random.uniform(0.5, 1.0))  # clients must not come all at once

    def _pause_of_busy(self, busy: ServerBusy) -> float | None:
        """The pause that a busy server asks for; None if it was out of memory too often."""
        if busy.retry_after is None:
            return None
        if busy.reason == "OUT_OF_MEMORY":
            self._resends += 1
            if self._end is None and self._resends > MOST_RESENDS:
                return None
        return self._in_time(busy.retry_after * random.uniform(1.0, 1.5))  # not all at once

    def _in_time(self, seconds: float) -> float | None:
        left = self.left()
        return None if left is not None and left <= seconds else seconds
