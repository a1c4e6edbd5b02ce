"""The context of the request that this thread works for."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from secateur_server.runtime.context import RequestContext as Watch

Work = TypeVar("Work")

_current: ContextVar[Watch] = ContextVar("watch", default=Watch())  # noqa: B039 (never stopped)


def watch() -> Watch:
    """The watch of the call that this thread works for; else one that nobody looks at."""
    return _current.get()


def checked(items: Iterable[Work]) -> Iterable[Work]:
    """The items, with a check of the call before each: for loops whose length the caller chooses.

    Raises:
        Stopped: The call is to end.
    """
    return watch().each(items)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """What this thread does in the block is seen by `watch`."""
    before = _current.get()
    _current.set(watch)
    try:
        yield
    finally:  # not by a token: a generator that is thrown away may end in another thread
        _current.set(before)
