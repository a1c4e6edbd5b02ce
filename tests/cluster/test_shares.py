"""Calls share the cores of a cluster: tenants first, and then the calls of each."""

import pickle
import threading
from concurrent.futures import Future
from typing import Any, cast

import pytest

from secateur_server.cut.drivers.link import Link, Result
from secateur_server.cut.drivers.packets import pickled
from secateur_server.cut.drivers.ray import WAITING, Ray
from secateur_server.errors import Cancelled
from secateur_server.runtime.context import RequestContext, Tenant
from tests.cluster import tasks
from tests.cluster.conftest import Counts
from tests.cluster.test_ray import in_thread
from tests.conftest import eventually

CORES = 4
TENANTS = {name: Tenant(name, name) for name in ("a", "b")}


class Submitted:
    """Stands for a cluster whose tasks end when a test says so. A piece is the name of its call."""

    cores = CORES

    def __init__(self) -> None:
        self.futures: list[tuple[str, Future[Result]]] = []

    def submit(self, data: bytes, node: str | None) -> tuple[int, Future[Result]]:
        _, call, *_ = pickle.loads(data)
        future: Future[Result] = Future()
        self.futures.append((call, future))
        return len(self.futures), future

    def cancel(self, numbers: list[int], is_forced: bool) -> None:
        for _, future in self.futures:
            if not future.done():
                future.set_result(("node", pickled(None)))

    def of(self, call: str) -> list[Future[Result]]:
        return [future for name, future in self.futures if name == call and not future.done()]

    def end_one(self, call: str) -> None:
        self.of(call)[0].set_result(("node", pickled(1)))


class Calls:
    """Calls of many tasks each, in threads."""

    def __init__(self, driver: Ray) -> None:
        self._driver = driver
        self._running: list[tuple[RequestContext, threading.Thread, list[object]]] = []

    def begin(self, name: str, tenant: str, count: int = 1000) -> None:
        context = RequestContext()
        context.tenant = TENANTS[tenant]
        begun = in_thread(
            lambda: self._driver.map(context, tasks.square, cast(Any, [name] * count))
        )
        self._running.append((context, *begun))

    def end(self) -> None:
        for context, _, _ in self._running:
            context.cancel()
        for _, thread, ended in self._running:
            thread.join()
            assert isinstance(ended[0], Cancelled), ended


@pytest.fixture
def link() -> Submitted:
    return Submitted()


def test_tenants_share_a_cluster(link: Submitted) -> None:
    calls = Calls(Ray(cast(Link, link), 1 << 20, Counts()))
    calls.begin("a1", "a")
    eventually(lambda: len(link.of("a1")), WAITING * CORES)
    calls.begin("b1", "b")
    half = WAITING * CORES // 2
    eventually(lambda: len(link.of("b1")), half)
    calls.begin("a2", "a")
    eventually(lambda: len(link.of("a2")), half // 2)
    # The first call starts no task before it is down to its share.
    before = len(link.futures)
    for _ in range(WAITING * CORES - half // 2):
        link.end_one("a1")
    assert len(link.futures) == before
    link.end_one("a1")
    eventually(lambda: len(link.futures), before + 1)
    assert len(link.of("a1")) == half // 2
    calls.end()


def test_each_call_has_a_task(link: Submitted) -> None:
    calls = Calls(Ray(cast(Link, link), 1 << 20, Counts()))
    names = [f"a{i}" for i in range(3 * WAITING * CORES)]
    for name in names:
        calls.begin(name, "a")
    for name in names:
        eventually(lambda name=name: bool(link.of(name)), True)  # type: ignore[misc]
    calls.end()
