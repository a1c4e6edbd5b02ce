"""Mapped files that are truncated while they are read.

The system would end the process at the first page that no longer exists. A handler puts zeros there
and remembers it, so that only the call that reads them fails.

Files are mapped since that is faster than pread to buffers, which needs no handler: for 400 MB in
the page cache a report took 0.026 s against 0.050 s, and a Prune 0.156 s against 0.181 s. Buffers
also take as much memory as the file, which mapped pages do not, and a file may exceed the memory.
"""

import ctypes
import mmap
import signal
import threading
import weakref

_PAGE = mmap.PAGESIZE
_MAP_FIXED = 0x10
_SA_SIGINFO = 4
_ADDRESS_OFFSET = 16  # of si_addr in siginfo_t, on 64 bits


class TruncationGuard:
    """Where a mapped file lies, and whether it was truncated when somebody read it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        held = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        self.begin = ctypes.addressof(held)
        self.end = self.begin + -(-len(mapped) // _PAGE) * _PAGE
        self.is_truncated = False
        _guarded.add(self)
        weakref.finalize(mapped, _guarded.discard, self)
        _install()

    def patch(self, address: int) -> None:
        """Puts zeros in the page at `address` and in all behind it."""
        self.is_truncated = True
        page = address & -_PAGE
        flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _libc.mmap(page, self.end - page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


_guarded: set[TruncationGuard] = set()
_lock = threading.Lock()
_is_installed = False

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """C's struct sigaction, on Linux."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_char * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_before = _Action()


def _on_fault(number: int, info: int, context: int) -> None:
    """Runs on the thread that read, which then reads again."""
    address = ctypes.c_void_p.from_address(info + _ADDRESS_OFFSET).value or 0
    for guard in tuple(_guarded):
        if guard.begin <= address < guard.end:
            guard.patch(address)
            return
    _libc.sigaction(number, ctypes.byref(_before), None)  # not ours: it ends as it always did


_handler = _Handler(_on_fault)


def _install() -> None:
    global _is_installed
    with _lock:
        if not _is_installed:
            action = _Action(handler=_handler, flags=_SA_SIGINFO)
            _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
            _is_installed = True
