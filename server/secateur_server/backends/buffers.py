"""Memory of calls that have ended, kept a moment for those that come.

The system gives memory page by page, and clears each; a virtual machine may have to ask its host
for them. That took as long as the passes over a model, and at times several times as long.
"""

import contextlib
import mmap
import queue
import threading
import time
from typing import Any

import numpy as np

# Smaller ones are malloc's. Larger ones would leave holes in its heap, between messages.
LEAST_BYTES = 1 << 20

# A block is given for what needs up to this share of it less.
SLACK = 8

# How long a block waits for somebody who needs it.
KEPT_SECONDS = 2.0


class Buffers:
    """Gives blocks out, and has them back when nothing refers to them any more.

    Where none fits, those that wait leave before another is made: so there are never more bytes of
    blocks than were once in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, Any]] = []  # since when; the oldest first
        # They come back in any thread, at any moment, so without the lock.
        self._back: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        self._is_kept = False

    def start(self) -> None:
        """Starts the thread that frees blocks. Raises RuntimeError if the system refuses one."""
        with self._lock:
            if not self._is_kept:
                threading.Thread(target=self._keep, name="blocks", daemon=True).start()
                self._is_kept = True

    def take(self, size: int) -> Any:
        """Memory of `size` bytes with anything in it.  Returns: a numpy array, uint8."""
        if size < LEAST_BYTES:
            return np.empty(size, np.uint8)
        self.start()
        with self._lock:
            self._collect()
            block = self._fitting(size)
            leaving = [] if block is not None else self._leaving(size)
        del leaving  # to give memory back takes long, and others need the lock
        return np.asarray(_Lease(_mapped(size) if block is None else block, size, self._back))

    def _fitting(self, size: int) -> Any:
        for most in (size, size + size // SLACK):
            for place, (_, block) in enumerate(self._waiting):
                if size <= len(block) <= most:
                    del self._waiting[place]
                    return block
        return None

    def _leaving(self, size: int) -> list[tuple[float, Any]]:
        """The oldest, of so many bytes or more, no longer wait."""
        count, found = 0, 0
        while count < len(self._waiting) and found < size:
            found += len(self._waiting[count][1])
            count += 1
        leaving, self._waiting = self._waiting[:count], self._waiting[count:]
        return leaving

    def _collect(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.append(self._back.get_nowait())

    def _keep(self) -> None:
        """Lets go who has waited for long."""
        while True:
            time.sleep(KEPT_SECONDS / 2)
            with self._lock:
                self._collect()
                now = time.monotonic()
                late = sum(now - since > KEPT_SECONDS for since, _ in self._waiting)
                leaving, self._waiting = self._waiting[:late], self._waiting[late:]
            del leaving


def _mapped(size: int) -> Any:
    """Memory of its own.  Returns: as Blocks.take."""
    try:
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # the system counts mappings, and malloc may still have room
        return np.empty(size, np.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # half the time of first touching it
        with contextlib.suppress(OSError):  # a kernel may be built without
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


class _Lease:
    """A block in use: what numpy and torch make of it refers to this."""

    def __init__(self, block: Any, size: int, back: "queue.SimpleQueue[tuple[float, Any]]") -> None:
        self._block, self._back = block, back
        self.__array_interface__ = block[:size].__array_interface__

    def __del__(self) -> None:
        self._back.put((time.monotonic(), self._block))
