"""How long, and how often, the client repeats a call that failed."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from secateur.errors import SecateurError, ServerBusy, Unavailable

Answer = TypeVar("Answer")

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

    def pause(self, tries: int) -> bool:
        """Waits, longer after more tries.

        Returns:
            False, without a wait, if not enough time remains.
        """
        most = min(MOST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** (tries - 1))
        return self._sleep(most * random.uniform(0.5, 1.0))  # clients must not come all at once

    def wait_for(self, busy: ServerBusy) -> bool:
        """Waits as long as a busy server asks.

        Returns:
            False, without a wait, if the server does not ask for a time, if not enough time
            remains, or if the server was out of memory too often.
        """
        if busy.retry_after is None:
            return False
        if busy.reason == "OUT_OF_MEMORY":
            self._resends += 1
            if self._end is None and self._resends > MOST_RESENDS:
                return False
        return self._sleep(busy.retry_after * random.uniform(1.0, 1.5))  # not all at once

    def repeat(
        self, attempt: Callable[[], Answer], is_passing: Callable[[SecateurError], bool]
    ) -> Answer:
        """Repeats an attempt until it succeeds, or until it is time to give up.

        Args:
            attempt: Makes the calls. It sets `tries` to 0 when there is progress.
            is_passing: Whether the attempt may succeed after an error. After ServerBusy it is
                repeated in any case.

        Raises:
            SecateurError: The last one.
        """
        self.tries = 0
        while True:
            try:
                return attempt()
            except ServerBusy as error:
                if not self.wait_for(error):
                    raise
            except SecateurError as error:
                self.tries += 1
                is_over = self._end is None and self.tries >= TRIES
                if not is_passing(error) or is_over or not self.pause(self.tries):
                    raise

    def until_served(
        self, attempt: Callable[[float | None], Answer], is_known: bool, is_safe: bool
    ) -> Answer:
        """Repeats a call while the server is busy, and after the connection broke.

        Args:
            attempt: Makes the call; its argument is the remaining seconds.
            is_known: Whether the server has ever answered: else no connection broke.
            is_safe: Whether the call may be repeated if it may have been served.

        Raises:
            SecateurError: The last one.
        """
        return self.repeat(
            lambda: attempt(self.left()),
            lambda error: is_known and is_safe and isinstance(error, Unavailable),
        )

    def _sleep(self, seconds: float) -> bool:
        left = self.left()
        if left is not None and left <= seconds:
            return False
        time.sleep(seconds)
        return True
