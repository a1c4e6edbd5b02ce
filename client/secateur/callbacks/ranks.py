"""One process of a distributed training asks the server for all. Imported with torch only."""

from collections.abc import Callable
from typing import Any

from torch import distributed


def from_first_rank(ask: Callable[[], Any]) -> Any:
    """Returns what a function returns, or raises what it raises, in the first process.

    All processes then have the same masks, also if the server fails.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return ask()
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [ask()]
        except Exception as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
