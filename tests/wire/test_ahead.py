"""What is received ahead arrives whole, in order, and bounded; and a reader may leave."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.wire.ahead import DEPTH, ahead
from tests.conftest import eventually
from tests.contract.raw import unhurried


@unhurried
@given(st.lists(st.binary(max_size=4), max_size=20))
def test_the_same_items_come_in_their_order(items: list[bytes]) -> None:
    assert list(ahead(iter(items))) == items


def test_what_raises_does_so_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("here")

    received = ahead(items())
    assert (next(received), next(received)) == (1, 2)
    with pytest.raises(ValueError, match="here"):
        next(received)


def test_no_more_is_received_than_waits() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    received = ahead(items())
    assert next(received) == 0
    # One was taken, DEPTH wait, and one more is held by the thread that has no room for it.
    eventually(lambda: len(made), DEPTH + 2)
    threading.Event().wait(0.1)
    assert len(made) == DEPTH + 2
    assert list(received) == list(range(1, 100))


def test_a_reader_that_leaves_ends_the_thread() -> None:
    def threads() -> int:
        return sum(thread.name == "ahead" for thread in threading.enumerate())

    before = threads()
    received = ahead(iter(range(100)))
    assert next(received) == 0
    received.close()  # type: ignore[attr-defined]
    eventually(threads, before)
