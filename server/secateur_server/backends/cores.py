"""The threads that work on pieces of tensors: one for each core.

torch's own threads meet at the end of every operation, and so wait long where other work takes a
core from one of them; threads that each take whole pieces do not. Nothing that a piece yields may
depend on the others, so no number of threads shows in a result.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Generic

import torch
from blake3 import blake3

from secateur_server.backends.buffers import BUFFERS
from secateur_server.backends.cgroups import cores
from secateur_server.backends.threads import Pool
from secateur_server.runtime.context import Found, Item, RequestContext

CORES = cores(len(os.sched_getaffinity(0)))

_thread = threading.local()


def one_thread() -> None:
    """Keeps torch to the calling thread."""
    torch.set_num_threads(1)


@contextmanager
def all_cores() -> Iterator[None]:
    """Lets torch use all cores in the calling thread: for products of matrices, which are large."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_this_thread() -> Iterator[None]:
    """Keeps all work of the calling thread to itself: other processes have the other cores."""
    before = getattr(_thread, "in_pool", False)
    _start_in_pool()
    try:
        yield
    finally:
        _thread.in_pool = before


def _start_in_pool() -> None:
    one_thread()
    _thread.in_pool = True


@cache
def _pool() -> Pool:
    return Pool(CORES, "pieces", _start_in_pool)


def start_threads() -> None:
    """Starts all threads that calls need.

    Raises:
        RuntimeError: The system refuses to start one.
    """
    _pool()
    BUFFERS.start()
    blake3(bytes(1 << 20), max_threads=blake3.AUTO)  # starts those that hash large files


def map_on_cores(
    context: RequestContext, function: Callable[[Item], Found], pieces: Iterable[Item]
) -> list[Found]:
    """As Backend.map, on all cores."""
    pieces = list(pieces)
    # One piece waits for no other thread; a thread of the pool must not wait for the pool.
    if len(pieces) <= 1 or getattr(_thread, "in_pool", False):
        return context.map(function, pieces)
    shared = _Shared(context, function, pieces)
    threads = range(min(CORES, len(pieces)))
    list(_pool().map(lambda _: shared.work(), threads))
    shared.check()
    return [shared.found[index] for index in range(len(pieces))]


class _Shared(Generic[Item, Found]):
    """Pieces that several threads take one by one, so that none waits for a slower one."""

    def __init__(
        self, context: RequestContext, function: Callable[[Item], Found], pieces: Sequence[Item]
    ) -> None:
        self.found: dict[int, Found] = {}
        self._failed: dict[int, BaseException] = {}
        self._context, self._function = context, function
        self._left: Iterator[tuple[int, Item]] = iter(enumerate(pieces))  # the GIL is its lock

    def work(self) -> None:
        """Works until no piece is left, or a thread fails."""
        while (taken := next(self._left, None)) is not None:
            index, piece = taken
            try:
                self._context.check()
                self.found[index] = self._function(piece)
            except BaseException as error:
                self._failed[index], self._left = error, iter(())

    def check(self) -> None:
        """Raises the error of the first piece that failed, as a single thread would.

        Threads take pieces in order and finish them, so all pieces before it are known.
        """
        if not self._failed:
            return
        try:
            raise self._failed[min(self._failed)]
        finally:
            self._failed.clear()  # an error refers to this frame, and with it to the pieces
