"""Time for ages: it passes evenly, also when somebody sets the system's clock."""

import time

# The system's clock is corrected by less than this all the time; by more where it is set. Times
# that callers see follow only the latter: else they would differ at each look.
STEP_SECONDS = 1.0


class Clock:
    """Moments, in seconds that only grow, and what they are as seconds since 1970."""

    def __init__(self) -> None:
        self._begin = _begin()

    def now(self) -> float:
        """The present moment."""
        return time.monotonic()

    def follow(self) -> float:
        """Follows the system's clock, if it was set.

        Returns:
            The seconds by which it was set; 0 if it was not.
        """
        step = _begin() - self._begin
        if abs(step) < STEP_SECONDS:
            return 0.0
        self._begin += step
        return step

    def wall(self, moment: float) -> float:
        """Seconds since 1970 of a moment."""
        return moment + self._begin

    def moment(self, wall: float) -> float:
        """The moment of a time in the past; the present one for a time that is still to come."""
        return min(wall - self._begin, self.now())


def _begin() -> float:
    """Seconds since 1970 of the moment 0."""
    return time.time() - time.monotonic()
