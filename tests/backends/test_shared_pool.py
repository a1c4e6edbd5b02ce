"""Work in the pool that calls share never waits for itself."""

import threading
import time

import pytest
import torch

from secateur_server.backends import backend_for
from secateur_server.backends.cores import map_on_cores
from secateur_server.backends.masks import Mask
from secateur_server.runtime.context import RequestContext

# Larger than a piece, so that the pool counts it.
BYTES = 8 << 20


def masks(count: int) -> list[Mask]:
    return [Mask(torch.full((BYTES,), 255, dtype=torch.uint8), BYTES * 8) for _ in range(count)]


def test_counting_in_the_pool_and_in_its_callers_does_not_deadlock() -> None:
    """With one lock for all masks, each counter would wait for the other."""
    backend, context = backend_for(torch.device("cpu")), RequestContext()
    found: list[int] = []

    def of_callers() -> None:
        found.extend(mask.kept(context) for mask in masks(20))

    def of_pool() -> None:
        for _ in range(10):
            found.extend(backend.map(context, lambda mask: mask.kept(context), masks(4)))

    threads = [threading.Thread(target=work, daemon=True) for work in (of_callers, of_pool)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert found == [BYTES * 8] * 60


def test_the_first_piece_that_fails_is_reported() -> None:
    """As with a single thread, however the threads take turns."""

    def fail(index: int) -> int:
        time.sleep(0.001 * (index == 3))  # a later piece fails first
        if index >= 3:
            raise ValueError(index)
        return index

    for _ in range(20):
        with pytest.raises(ValueError, match="3"):
            map_on_cores(RequestContext(), fail, range(50))
