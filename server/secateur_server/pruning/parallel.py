"""Work on pieces of tensors, on all cores.

torch's own threads meet at the end of every operation, and so wait long where other work takes a
core from one of them; threads that each take whole pieces do not. Nothing that a piece yields may
depend on the others, so no number of threads shows in a result.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Found = TypeVar("Found")

# Elements of a piece: its temporaries stay in the caches.
PIECE = 1 << 20

CORES = len(os.sched_getaffinity(0))


def one_thread() -> None:
    """Keeps torch to the calling thread."""
    torch.set_num_threads(1)


_POOL = ThreadPoolExecutor(CORES, thread_name_prefix="pieces", initializer=one_thread)


def each(function: Callable[[Piece], Found], pieces: Iterable[Piece]) -> list[Found]:
    """What `function` makes of each piece, in their order."""
    pieces = list(pieces)
    if len(pieces) == 1:  # no need to wait for another thread
        return [function(pieces[0])]
    return list(_POOL.map(function, pieces))


def spans(count: int, size: int | None = None) -> list[tuple[int, int]]:
    """[begin, end) of the pieces of `size`, or of PIECE, that make up `count`."""
    size = size or PIECE
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]
