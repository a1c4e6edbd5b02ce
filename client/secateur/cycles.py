"""Pauses Python's search for reference cycles while many objects without cycles are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Pauses the search in the block, or in the calls of a function that this decorates.

    Each time that the objects of the process have grown by a quarter, Python visits all of them.
    The modules of torch alone are 180,000, so that a state_dict of 12,000 tensors would have most
    of its time spent on visits.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()
