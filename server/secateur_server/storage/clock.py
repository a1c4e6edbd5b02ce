"""A clock for the ages of checkpoints, which setting the system's clock does not change."""

import time

# NTP corrects the system's clock by less than this all the time. Times shown to callers follow
# only larger steps, or each call would show slightly different times.
STEP_SECONDS = 1.0


class Clock:
    """Monotonic moments in seconds, and their conversion to seconds since 1970."""

    def __init__(self) -> None:
        self._begin = _begin()

    def now(self) -> float:
        """The present moment."""
        return time.monotonic()

    def follow(self) -> float:
        """Adopts the system's clock if it was set. Returns by how many seconds; 0: it was not."""
        step = _begin() - self._begin
        if abs(step) < STEP_SECONDS:
            return 0.0
        self._begin += step
        return step

    def wall(self, moment: float) -> float:
        """Converts a moment to seconds since 1970."""
        return moment + self._begin

    def moment(self, wall: float) -> float:
        """Converts seconds since 1970 to a moment; a future time becomes the present moment."""
        return min(wall - self._begin, self.now())


def _begin() -> float:
    """The moment 0, in seconds since 1970."""
    return time.time() - time.monotonic()
