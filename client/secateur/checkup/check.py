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


class Clock:
    """The time that checks have."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float) -> float:
        """Returns the seconds for a check, at most `most`."""
        return max(0.1, min(most, self._end - time.monotonic()))
