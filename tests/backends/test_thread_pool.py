"""Thread pools, which start all threads in advance."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError, wait

import pytest

from secateur_server.backends.threads import Pool


def test_pool_uses_all_its_threads() -> None:
    pool, together = Pool(4, "worker"), threading.Barrier(4)
    try:
        done = [pool.submit(together.wait, 60) for _ in range(4)]
        assert sorted(future.result(60) for future in done) == [0, 1, 2, 3]
        assert list(pool.map(lambda value: 2 * value, range(100))) == list(range(0, 200, 2))
    finally:
        pool.shutdown()


def test_sequential_work_uses_one_thread() -> None:
    pool = Pool(8, "worker")
    try:
        names = set()
        for _ in range(50):
            names.add(pool.submit(lambda: threading.current_thread().name).result(60))
            wait_until_idle(pool, 8)
        assert len(names) == 1
    finally:
        pool.shutdown()


def wait_until_idle(pool: Pool, count: int) -> None:
    from tests.conftest import eventually

    eventually(lambda: len(pool._idle), count)


def test_error_is_raised_in_the_caller_and_keeps_nothing_alive() -> None:
    class Model:
        pass

    pool, model = Pool(1, "worker"), Model()

    def fail(model: Model) -> None:
        raise ValueError("no")

    gc.disable()
    try:
        future, seen = pool.submit(fail, model), weakref.ref(model)
        with pytest.raises(ValueError, match="no"):
            future.result(60)
        wait_until_idle(pool, 1)
        del future, model
        assert seen() is None
    finally:
        gc.enable()
        pool.shutdown()


def test_closed_pool_finishes_its_work_and_accepts_no_more() -> None:
    pool, is_free = Pool(2, "ending"), threading.Event()
    done = [pool.submit(is_free.wait, 60) for _ in range(6)]
    pool.shutdown()
    late = pool.submit(print)
    is_free.set()
    assert wait(done, 60).not_done == set()
    with pytest.raises(CancelledError):
        late.result(60)
    for thread in threading.enumerate():
        if thread.name.startswith("ending"):
            thread.join(60)
            assert not thread.is_alive()
    assert done[0].result() is True


def test_cancelled_work_is_not_run() -> None:
    pool, is_free = Pool(1, "worker"), threading.Event()
    try:
        pool.submit(is_free.wait, 60)
        cancelled, found = pool.submit(pytest.fail, "it ran"), list[int]()
        assert cancelled.cancel()
        after = pool.submit(found.append, 1)
        is_free.set()
        after.result(60)
        assert found == [1]
    finally:
        pool.shutdown()
