"""Remote stores that do not answer: calls end in time, and the number of threads is limited."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec.asyn
import pytest

from secateur_server.errors import QueueFull
from secateur_server.runtime.context import RequestContext
from secateur_server.uris.requests import MAX_THREADS, Requests
from tests.conftest import eventually
from tests.contract.raw import check_serves
from tests.uris.conftest import environment_of
from tests.uris.served import MODEL, Served, check, serving_here

CALLS = MAX_THREADS + 8


def place(listening: socket.socket) -> str:
    return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield place(listening)


@pytest.fixture(scope="module")
def silent_ftp() -> Iterator[socket.socket]:
    """Another one."""
    with socket.create_server(("127.0.0.1", 0), backlog=4 * CALLS) as listening:
        yield listening


@pytest.fixture(scope="module")
def served(silent: str, silent_ftp: socket.socket) -> Iterator[Served]:
    ftp = place(silent_ftp)
    listed = f"s3://bucket/models,http://{silent}/models,ftp://{ftp}/models"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in environment_of(f"http://{silent}").items():
            environment.setenv(name, value)
        s3 = fsspec.get_filesystem_class("s3")
        s3.clear_instance_cache()  # what is there knows another endpoint
        with serving_here("--allow-uri", listed, "--idle-timeout", "0.2") as running:
            yield running
        s3.clear_instance_cache()


def remote_threads() -> int:
    return sum(thread.name == "remote" for thread in threading.enumerate())


def tasks() -> int:
    """What is at work on the event loop of fsspec."""
    return len(asyncio.all_tasks(fsspec.asyn.get_loop()))


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_request_on_an_event_loop_is_cancelled(served: Served, silent: str, kind: str) -> None:
    uri = "s3://bucket/models/x" if kind == "s3" else f"http://{silent}/models/x"
    for _ in range(3):
        found = served.read(uri)
        check(found, "FAILED_PRECONDITION", "URI_FAILED", uri, "0.2 seconds (--idle-timeout)")
    eventually(remote_threads, 0)
    eventually(tasks, 0)


def test_uncancellable_requests_use_a_limited_number_of_threads(
    served: Served, silent: str, silent_ftp: socket.socket
) -> None:
    """As of ftp, where a connection waits for half a minute."""
    uri = f"ftp://{place(silent_ftp)}/models/x"
    with ThreadPoolExecutor(CALLS) as pool:
        found = list(pool.map(served.read, [uri] * CALLS))
    assert {(f.reason, f.code.name) for f in found if f} == {
        ("URI_FAILED", "FAILED_PRECONDITION"),
        ("QUEUE_FULL", "RESOURCE_EXHAUSTED"),
    }
    assert remote_threads() == MAX_THREADS
    check(served.read(f"http://{silent}/models/x"), "FAILED_PRECONDITION", "URI_FAILED")
    check_serves(served.server, served.channel)
    silent_ftp.close()
    eventually(remote_threads, 0)


def test_threads_are_reused_after_requests() -> None:
    requests, ends = Requests(0.05), threading.Event()
    waiting = [requests.in_thread(RequestContext(), ends.wait) for _ in range(MAX_THREADS)]
    with pytest.raises(TimeoutError):
        requests.result(RequestContext(), waiting[0])
    with pytest.raises(QueueFull):
        requests.in_thread(RequestContext(), ends.wait)
    ends.set()
    assert Requests(300).result(RequestContext(), waiting[0])
    again = requests.in_thread(RequestContext(), lambda: "again")
    assert requests.result(RequestContext(), again) == "again"


def test_write_ends_at_the_timeout(served: Served) -> None:
    checkpoint = served.client.upload(MODEL)
    found = served.write("", "s3://bucket/models/out", uri=None, checkpoint=checkpoint.name)
    check(found, "FAILED_PRECONDITION", "URI_FAILED", "models/out", "(--idle-timeout)")
