"""Buffers of calls that have ended, kept a moment for the next calls.

The system allocates memory page by page, and clears each; a virtual machine may have to ask its
host for them. That took as long as pruning a model, and at times several times as long.
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

# A buffer serves a size that is smaller by up to this share of it.
SLACK = 8

# How long a buffer stays idle before it is freed.
KEPT_SECONDS = 2.0


class Buffers:
    """Allocates buffers, and reuses them when nothing refers to them any more.

    Where no idle buffer fits, idle ones are freed before a new one is allocated: so there are never
    more bytes of buffers than were once in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Any]] = []  # since when; the oldest first
        # They come back in any thread, at any moment, so without the lock.
        self._back: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        self._is_kept = False

    def start(self) -> None:
        """Starts the thread that frees buffers. Raises RuntimeError if the system refuses one."""
        with self._lock:
            if not self._is_kept:
                threading.Thread(target=self._keep, name="buffers", daemon=True).start()
                self._is_kept = True

    def take(self, size: int) -> Any:
        """Allocates `size` bytes.  Returns: a numpy array, uint8, with any values."""
        if size < LEAST_BYTES:
            return np.empty(size, np.uint8)
        self.start()
        with self._lock:
            self._collect()
            buffer = self._fitting(size)
            freed = [] if buffer is not None else self._oldest(size)
        del freed  # this takes long, and other threads need the lock
        return np.asarray(_Lease(_mapped(size) if buffer is None else buffer, size, self._back))

    def _fitting(self, size: int) -> Any:
        for most in (size, size + size // SLACK):
            for place, (_, buffer) in enumerate(self._idle):
                if size <= len(buffer) <= most:
                    del self._idle[place]
                    return buffer
        return None

    def _oldest(self, size: int) -> list[tuple[float, Any]]:
        """Takes the oldest idle buffers, of `size` bytes or more."""
        count, found = 0, 0
        while count < len(self._idle) and found < size:
            found += len(self._idle[count][1])
            count += 1
        oldest, self._idle = self._idle[:count], self._idle[count:]
        return oldest

    def _collect(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.append(self._back.get_nowait())

    def _keep(self) -> None:
        """Frees buffers that have been idle for long."""
        while True:
            time.sleep(KEPT_SECONDS / 2)
            with self._lock:
                self._collect()
                now = time.monotonic()
                late = sum(now - since > KEPT_SECONDS for since, _ in self._idle)
                freed, self._idle = self._idle[:late], self._idle[late:]
            del freed


BUFFERS = Buffers()


def _mapped(size: int) -> Any:
    """Memory of its own.  Returns: as Blocks.take."""
    try:
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # the system counts mappings, and malloc may still have memory
        return np.empty(size, np.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # half the time of first touching it
        with contextlib.suppress(OSError):  # a kernel may be built without
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


class _Lease:
    """A buffer in use: what numpy and torch make of it refers to this."""

    def __init__(
        self, buffer: Any, size: int, back: "queue.SimpleQueue[tuple[float, Any]]"
    ) -> None:
        self._block, self._back = buffer, back
        self.__array_interface__ = buffer[:size].__array_interface__

    def __del__(self) -> None:
        self._back.put((time.monotonic(), self._block))
