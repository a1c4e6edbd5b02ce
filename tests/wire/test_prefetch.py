"""Prefetched items arrive complete, in order and in limited number; and a reader may stop."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.errors import Cancelled, IdleTimeout
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.prefetch import DEPTH, MinThroughput, prefetch
from tests.clock import Clock, install
from tests.conftest import eventually
from tests.contract.raw import unhurried


@pytest.fixture(scope="module")
def receivers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@unhurried
@given(items=st.lists(st.binary(max_size=4), max_size=20))
def test_items_arrive_in_order(receivers: ThreadPoolExecutor, items: list[bytes]) -> None:
    assert list(prefetch(iter(items), receivers)) == items


def test_errors_are_raised_in_order(receivers: ThreadPoolExecutor) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("here")

    received = prefetch(items(), receivers)
    assert (next(received), next(received)) == (1, 2)
    with pytest.raises(ValueError, match="here"):
        next(received)


def test_no_more_than_the_depth_is_received_ahead(receivers: ThreadPoolExecutor) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    received = prefetch(items(), receivers)
    assert next(received) == 0
    threading.Event().wait(0.1)
    assert len(made) == 1  # whoever has asked for one item may have to wait before the next
    assert next(received) == 1
    eventually(lambda: len(made), 2 + DEPTH)
    threading.Event().wait(0.1)
    assert len(made) == 2 + DEPTH
    assert list(received) == list(range(2, 100))


def test_missing_item_ends_at_the_timeout(
    receivers: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, comes = Clock(), threading.Event()
    install(clock, monkeypatch)

    def items() -> Iterator[int]:
        yield 1
        comes.wait()

    received = prefetch(items(), receivers, timeout=0.2)
    assert next(received) == 1
    with ThreadPoolExecutor(1) as reader:
        item = reader.submit(next, received)
        threading.Event().wait(0.1)
        assert not item.done()
        clock.step(0.2)
        eventually(item.done, True)
    with pytest.raises(IdleTimeout, match=r"no message has arrived for 0\.2 seconds"):
        item.result()
    comes.set()


def test_waiting_reader_ends_when_its_request_is_cancelled(
    receivers: ThreadPoolExecutor,
) -> None:
    context, comes = RequestContext(), threading.Event()

    def items() -> Iterator[int]:
        comes.wait()
        yield 1

    received = prefetch(items(), receivers, timeout=300, check=context.check)
    with ThreadPoolExecutor(1) as reader:
        item = reader.submit(next, received)
        context.cancel()
        with pytest.raises(Cancelled):
            item.result(timeout=300)
    comes.set()


def test_fast_start_does_not_excuse_later_silence() -> None:
    pace = MinThroughput(limit=100, grace=10.0)
    pace.count(0.0, 1_000_000)
    pace.count(9.0, 0)
    pace.count(5.0, 500)  # exactly the limit
    with pytest.raises(IdleTimeout, match="100 bytes a second"):
        pace.count(1.5, 0)


def test_abandoned_reader_frees_its_thread() -> None:
    with ThreadPoolExecutor(1) as receivers:
        received = prefetch(iter(range(100)), receivers)
        assert next(received) == 0
        received.close()
        assert list(prefetch(iter([1]), receivers)) == [1]  # there is but one thread
