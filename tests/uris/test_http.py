"""http:// URIs, against a real server: sizes, ranges and redirects."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from safetensors.torch import save

from tests.contract.raw import check_serves
from tests.pruning.torch_side import assert_same_tensors
from tests.uris.served import HALF, MODEL, Served, check, serving_here

DATA = save(MODEL)
Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A web server of some pages, each a function that answers a request.

    asked: the paths that were asked for.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Answer] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                site.pages[self.path](self)

            do_HEAD = do_GET  # noqa: N815 (http.server's name)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()
        self.root = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(request: BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(data)


def model(request: BaseHTTPRequestHandler) -> None:
    """Answers with DATA, or with a range of it."""
    begin, end = 0, len(DATA)
    if asked := request.headers.get("Range"):
        first, last = asked.removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last) + 1, end)
    part = DATA[begin:end]
    answer(request, 206 if asked else 200, part, Content_Length=str(len(part)))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Served]:
    with serving_here("--allow-uri", f"{site.root}/models") as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served, site: Site) -> Iterator[None]:
    site.pages = {"/models/model": model}
    site.asked.clear()
    yield
    check_serves(served.server, served.channel)


def test_a_model_is_read(served: Served, site: Site) -> None:
    of_uri = served.client.prune(f"{site.root}/models/model", HALF)
    assert_same_tensors(of_uri.masks, served.client.prune(MODEL, HALF).masks)


def test_a_remote_that_does_not_tell_its_size_is_an_error(served: Served, site: Site) -> None:
    site.pages["/models/x"] = lambda request: answer(request, 200, DATA)
    uri = f"{site.root}/models/x"
    check(served.read(uri), "FAILED_PRECONDITION", "URI_FAILED", uri, "Content-Length")


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_status_that_is_an_error_is_told(served: Served, site: Site, status: int) -> None:
    site.pages["/models/x"] = lambda request: answer(request, status, b"secret")
    uri = f"{site.root}/models/x"
    if status == 404:
        check(served.read(uri), "NOT_FOUND", "URI_NOT_FOUND", uri)
    else:
        check(served.read(uri), "FAILED_PRECONDITION", "URI_FAILED", uri, str(status))
