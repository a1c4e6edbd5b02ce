"""Memory that calls leave to those that come."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from secateur_server.backends.buffers import LEAST_BYTES, SLACK, Buffers
from tests.conftest import eventually, examples
from tests.operate.test_memory import memory

MIB = 1 << 20


def address(block: Any) -> int:
    return int(block.ctypes.data)


def test_what_was_let_go_is_given_to_who_needs_as_much() -> None:
    blocks = Buffers()
    first = blocks.take(9 * LEAST_BYTES)
    where, part = address(first), first[5:7]
    del first
    second = blocks.take(9 * LEAST_BYTES)
    assert address(second) != where  # a part of the first is still in use
    del part
    smaller = blocks.take(9 * LEAST_BYTES - LEAST_BYTES // SLACK)
    assert address(smaller) == where
    assert len(smaller) == 9 * LEAST_BYTES - LEAST_BYTES // SLACK


@examples(60)
@given(st.lists(st.integers(1, 40) | st.none(), max_size=30))
def test_no_memory_is_given_twice(wanted: list[int | None]) -> None:
    """Each block keeps what was written to it, whatever comes and goes.  None: the oldest goes."""
    blocks, held = Buffers(), list[Any]()
    for number, size in enumerate(wanted):
        if size is None:
            del held[:1]
            continue
        block = blocks.take(size * LEAST_BYTES // 4)
        assert len(block) == size * LEAST_BYTES // 4
        block[:] = number
        held.append((number, block))
    assert all(bool((block == number).all()) for number, block in held)


def test_what_waits_makes_room_and_goes_back_to_the_system() -> None:
    """In a process whose memory nobody else changes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_take_and_let_go).result()


def _take_and_let_go() -> None:
    blocks, before = Buffers(), resident()
    for size in (128, 200, 150, 220):  # none fits in for the next
        block = blocks.take(size * MIB)
        block[:] = 1
        assert (size - 50) * MIB < resident() - before < (size + 50) * MIB
        del block
    later = blocks.take(2 * MIB)  # somebody still works: it is no end that gives memory back
    eventually(lambda: resident() < before + 50 * MIB, True)
    assert len(later) == 2 * MIB


def resident() -> int:
    return memory(os.getpid(), "VmRSS")
