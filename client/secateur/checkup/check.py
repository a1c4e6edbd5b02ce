"""The result of a check, and its time."""

import time
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: What was checked.
        status: "fail" if commands cannot work, "warn" if they work badly.
        found: What the check found.
        advice: What to do; empty for "ok".
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def failed(name: str, said: str, otherwise: str) -> Check:
    """Makes a failed check of a message such as `the fact: the advice`.

    Args:
        name: What was checked.
        said: The message.
        otherwise: The advice if the message has none.
    """
    found, _, advice = said.rpartition(": ")
    return Check(name, "fail", found, advice) if found else Check(name, "fail", said, otherwise)


# How many steps may take all of their time before none is left.
_STEPS = 5


class Clock:
    """The time that checks have."""

    def __init__(self, seconds: float) -> None:
        self._step, self._end = seconds / _STEPS, time.monotonic() + seconds

    def step(self) -> float:
        """Returns the most seconds that a step of a check may take."""
        return min(self._step, self.rest())

    def rest(self) -> float:
        """Returns all seconds that are left, or a tenth of one."""
        return max(0.1, self._end - time.monotonic())
