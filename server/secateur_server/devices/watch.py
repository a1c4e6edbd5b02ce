"""How far a call has come, and whether it is to stop: seen by all loops over pieces."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secateur_server.errors import Stopped

Work = TypeVar("Work")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Stage:
    """What a call did.  begun, ended: nanoseconds since 1970.  seconds: of all threads at it."""

    begun: int
    ended: int
    seconds: float


class Watch:
    """One call.

    work_memory: bytes that it may take beside its model, as a rule; None is no bound.
    scratch: the folder for what is larger.
    now: what it does (fetch, read, prune or write), of how many bytes (0 where nobody knows), and
    what `done` was before; in one, so that who looks at it sees no half of two.
    done: bytes of all phases.  read: bytes of the model.  share: of the whole, as last told.
    stages: by name, receive, score, select, encode and send.
    """

    def __init__(self, work_memory: int | None = None, scratch: Path | None = None) -> None:
        self.work_memory, self.scratch = work_memory, scratch
        self.now = "", 0, 0
        self.done = self.read = 0
        self.share = 0.0
        self.stages: dict[str, Stage] = {}
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()

    def stop(self) -> None:
        """The call is to end, with the next piece of any of its threads."""
        self._is_stopped.set()

    def check(self) -> None:
        """Errors: Stopped."""
        if self._is_stopped.is_set():
            raise Stopped("call", "the caller has left")

    def each(self, function: Callable[[Work], Found], pieces: Iterable[Work]) -> list[Found]:
        """What `function` makes of each piece, in their order.  Errors: Stopped."""
        found = []
        for piece in pieces:
            self.check()
            found.append(function(piece))
        return found

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block as a part of a stage; other threads may be at the same one."""
        now, begun = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            ended = now + int(seconds * 1e9)
            with self._lock:
                before = self.stages.get(name, Stage(now, ended, 0.0))
                self.stages[name] = Stage(
                    min(before.begun, now), max(before.ended, ended), before.seconds + seconds
                )

    def begin(self, phase: str, total: int = 0) -> None:
        """A new phase begins."""
        self.now = phase, total, self.done

    def advance(self, count: int) -> None:
        """Adds bytes.  Errors: Stopped."""
        self.check()
        self.done += count
        if self.now[0] in ("fetch", "read"):  # what was fetched is read once more, from the disk
            self.read = max(self.read, self.done - self.now[2])


_current: ContextVar[Watch] = ContextVar("watch", default=Watch())  # noqa: B039 (never stopped)


def watch() -> Watch:
    """The watch of the call that this thread works for; else one that nobody looks at."""
    return _current.get()


def checked(items: Iterable[Work]) -> Iterator[Work]:
    """The items, with a check of the call before each: for loops whose length the caller chooses.

    Raises:
        Stopped: The call is to end.
    """
    of_call = watch()
    for item in items:
        of_call.check()
        yield item


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """What this thread does in the block is seen by `watch`."""
    before = _current.get()
    _current.set(watch)
    try:
        yield
    finally:  # not by a token: a generator that is thrown away may end in another thread
        _current.set(before)
