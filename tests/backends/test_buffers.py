"""Buffers of ended calls are reused by later calls."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from secateur_server.backends.buffers import LEAST_BYTES, SLACK, Buffers
from tests.conftest import eventually, examples
from tests.processes import memory

MIB = 1 << 20


def address(buffer: Any) -> int:
    return int(buffer.ctypes.data)


def test_an_unused_buffer_is_reused_for_a_similar_size() -> None:
    buffers = Buffers()
    first = buffers.take(9 * LEAST_BYTES)
    begin, part = address(first), first[5:7]
    del first
    second = buffers.take(9 * LEAST_BYTES)
    assert address(second) != begin  # a part of the first is still in use
    del part
    smaller = buffers.take(9 * LEAST_BYTES - LEAST_BYTES // SLACK)
    assert address(smaller) == begin
    assert len(smaller) == 9 * LEAST_BYTES - LEAST_BYTES // SLACK


@examples(60)
@given(st.lists(st.integers(1, 40) | st.none(), max_size=30))
def test_no_buffer_is_handed_out_twice(wanted: list[int | None]) -> None:
    """Each buffer keeps its content while others are taken and released.

    Args:
        wanted: Sizes of buffers to take; None releases the oldest one.
    """
    buffers, held = Buffers(), list[Any]()
    for number, size in enumerate(wanted):
        if size is None:
            del held[:1]
            continue
        buffer = buffers.take(size * LEAST_BYTES // 4)
        assert len(buffer) == size * LEAST_BYTES // 4
        buffer[:] = number
        held.append((number, buffer))
    assert all(bool((buffer == number).all()) for number, buffer in held)


def test_idle_buffers_are_freed() -> None:
    """Runs in its own process, whose memory no other test changes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_check_idle_buffers_are_freed).result()


def _check_idle_buffers_are_freed() -> None:
    buffers, before = Buffers(), resident()
    for size in (128, 200, 150, 220):  # none can be reused for the next
        buffer = buffers.take(size * MIB)
        buffer[:] = 1
        assert (size - 50) * MIB < resident() - before < (size + 50) * MIB
        del buffer
    later = buffers.take(2 * MIB)  # memory is released although a buffer is in use
    eventually(lambda: resident() < before + 50 * MIB, True)
    assert len(later) == 2 * MIB


def resident() -> int:
    return memory(os.getpid(), "VmRSS")
