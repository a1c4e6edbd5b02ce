"""Memory that the C library keeps when requests have freed it, given back to the system."""

import ctypes
import threading

# How long after the end of a request; the requests that end meanwhile are looked at together.
DELAY_SECONDS = 1.0
# Less is kept for the next requests: to give it back and to get it again takes time.
KEPT_BYTES = 64 << 20


class Trimmer:
    """Gives free memory back, from a thread of its own, when requests have ended."""

    def __init__(self) -> None:
        self._has_ended, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def request_ended(self) -> None:
        """Makes the thread look at what is free, in a moment."""
        self._has_ended.set()

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        self._has_ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._has_ended.wait()
            if self._is_closed.wait(DELAY_SECONDS):
                return
            self._has_ended.clear()
            if _free_bytes() > KEPT_BYTES:
                _LIBC.malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc; fordblks: free bytes of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_LIBC = ctypes.CDLL(None)
_CAN_TRIM = hasattr(_LIBC, "mallinfo2") and hasattr(_LIBC, "malloc_trim")  # glibc from 2.33 on
if _CAN_TRIM:
    _LIBC.mallinfo2.restype = _MallInfo


def _free_bytes() -> int:
    """What the C library keeps, given back or not; 0 where it cannot be asked."""
    return int(_LIBC.mallinfo2().fordblks) if _CAN_TRIM else 0
