"""Memory that requests have freed and that returns to the system, and allocations that fail."""

import ctypes
import threading

import torch

from secateur_server.runtime.disk import NO_RESOURCES

# Seconds after the end of a request. Requests that end meanwhile are handled together.
DELAY_SECONDS = 1.0
# Kept for the next requests, since returning and allocating memory takes time.
KEPT_BYTES = 64 << 20

# Messages of torch and Triton for failed allocations without an exception class of their own.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation has failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno in NO_RESOURCES:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


class Trimmer:
    """Returns free memory to the system after requests, in a thread of its own."""

    def __init__(self) -> None:
        self._has_ended, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def request_ended(self) -> None:
        """Wakes the thread, which waits DELAY_SECONDS."""
        self._has_ended.set()

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        self._has_ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._has_ended.wait()
            # Before the check, as `close` may set both events at any time after it.
            self._has_ended.clear()
            if self._is_closed.wait(DELAY_SECONDS):
                return
            if _free_bytes() > KEPT_BYTES:
                _LIBC.malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc; fordblks: free bytes of all arenas."""

    _fields_ = (
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


_LIBC = ctypes.CDLL(None)
_CAN_TRIM = hasattr(_LIBC, "mallinfo2") and hasattr(_LIBC, "malloc_trim")  # glibc from 2.33 on
if _CAN_TRIM:
    _LIBC.mallinfo2.restype = _MallInfo


def _free_bytes() -> int:
    """Free bytes that the C library keeps; 0 if it cannot report them."""
    return int(_LIBC.mallinfo2().fordblks) if _CAN_TRIM else 0
