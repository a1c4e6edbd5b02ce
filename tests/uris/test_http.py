"""http:// URIs, against a real server: sizes, ranges and redirects."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import save

import secateur
from secateur.calls.patience import Patience
from secateur_server.errors import UriNotAllowed
from secateur_server.runtime.context import RequestContext
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.uris import Uris
from tests.conftest import eventually
from tests.contract.raw import check_serves, entry, file, series
from tests.reference import assert_same_tensors
from tests.storage.stored import in_blocks
from tests.uris.served import HALF, MODEL, Served, check, serving_here

DATA = save(MODEL)
FETCHED = "secateur_fetched_bytes_total"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """A web server of some pages, each a function that answers a request.

    asked: the requests that came, each a method and a path.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Answer] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(f"{self.command} {self.path}")
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


def page(data: bytes) -> Answer:
    """Answers with `data`, or with a range of it."""

    def answered(request: BaseHTTPRequestHandler) -> None:
        begin, end = 0, len(data)
        if asked := request.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last) + 1, end)
        part = data[begin:end]
        answer(request, 206 if asked else 200, part, Content_Length=str(len(part)))

    return answered


def zeros(size: int) -> bytes:
    """A model of `size` bytes of zeros."""
    return file({"w": entry("F32", [size // 4], 0, size)}, bytes(size))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Served]:
    sizes = ("--max-model-bytes", "4MiB", "--work-memory", "1MiB", "--store-max-bytes", "8MiB")
    with serving_here("--allow-uri", f"{site.root}/models", *sizes) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served, site: Site) -> Iterator[None]:
    site.pages = {"/models/model": page(DATA)}
    site.asked.clear()
    yield
    check_serves(served.server, served.channel)


def test_a_model_is_read(served: Served, site: Site) -> None:
    of_uri = served.client.prune(f"{site.root}/models/model", HALF)
    assert_same_tensors(of_uri.masks, served.client.prune(MODEL, HALF).masks)


def test_remote_without_a_size_is_an_error(served: Served, site: Site) -> None:
    site.pages["/models/x"] = lambda request: answer(request, 200, DATA)
    uri = f"{site.root}/models/x"
    check(served.read(uri), "FAILED_PRECONDITION", "URI_FAILED", uri, "Content-Length")


@pytest.mark.parametrize("status", [403, 404, 500])
def test_http_error_is_reported(served: Served, site: Site, status: int) -> None:
    site.pages["/models/x"] = lambda request: answer(request, status, b"secret")
    uri = f"{site.root}/models/x"
    if status == 404:
        check(served.read(uri), "NOT_FOUND", "URI_NOT_FOUND", uri)
    else:
        check(served.read(uri), "FAILED_PRECONDITION", "URI_FAILED", uri, str(status))


def test_change_while_reading_is_detected(served: Served, site: Site) -> None:
    dates = iter(("Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:01 GMT"))

    def changing(request: BaseHTTPRequestHandler) -> None:
        if request.command == "HEAD":
            answer(request, 200, b"", Content_Length=str(len(DATA)), Last_Modified=next(dates))
        else:
            page(DATA)(request)

    site.pages["/models/x"] = changing
    check(served.read(f"{site.root}/models/x"), "ABORTED", "URI_CHANGED", "models/x")


# Bounds --------------------------------------------------------------------------------------


def test_too_large_model_is_refused_before_it_is_fetched(served: Served, site: Site) -> None:
    site.pages["/models/large"] = page(zeros(5 << 20))
    site.pages["/models/huge"] = page(zeros(9 << 20))
    large, huge = f"{site.root}/models/large", f"{site.root}/models/huge"
    for rpc in ("Report", "Prune", "Plan", "Finalize"):
        found = served.read(large, rpc)
        check(found, "RESOURCE_EXHAUSTED", "MODEL_TOO_LARGE", large, "--max-model-bytes")
    with pytest.raises(secateur.StoreFull):
        served.client.upload(huge)
    assert {asked.split()[0] for asked in site.asked} == {"HEAD"}
    served.client.delete(served.client.upload(large))


def test_sum_of_shards_counts(served: Served, site: Site) -> None:
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    site.pages["/models/x.index.json"] = page(json.dumps(index).encode())
    for name in ("1", "2"):
        site.pages[f"/models/{name}.safetensors"] = page(zeros(3 << 20))
    found = served.read(f"{site.root}/models/x.index.json")
    check(found, "RESOURCE_EXHAUSTED", "MODEL_TOO_LARGE", "x.index.json", "--max-model-bytes")
    fetched = [asked for asked in site.asked if asked.startswith("GET")]
    assert fetched == ["GET /models/x.index.json"]


def test_a_model_is_admitted_to_memory_before_it_is_fetched(site: Site) -> None:
    site.pages["/models/x"] = page(zeros(3 << 20))
    listed = ("--allow-uri", f"{site.root}/models", "--max-model-bytes", "4MiB")
    with serving_here(*listed, "--memory-limit", "2MiB") as small:
        found = small.read(f"{site.root}/models/x")
        check(found, "RESOURCE_EXHAUSTED", "MODEL_TOO_LARGE", "--memory-limit")
    assert site.asked == ["HEAD /models/x"]


def test_fetched_files_keep_within_their_disk_limit(served: Served, site: Site) -> None:
    """Two of three calls with 3 MiB fit in the 8 MiB, however slow their remote is."""
    data, ready = zeros(3 << 20), threading.Event()

    def slow(request: BaseHTTPRequestHandler) -> None:
        if request.command == "GET":
            ready.wait(300)
        page(data)(request)

    def disk() -> float:
        return series(served.server, "secateur_fetched_disk_bytes")

    site.pages["/models/slow"] = slow
    uri, before = f"{site.root}/models/slow", series(served.server, FETCHED)
    with ThreadPoolExecutor(2) as pool:
        try:
            calls = [pool.submit(served.read, uri) for _ in range(2)]
            eventually(disk, 2.0 * in_blocks(len(data)))
            refused = served.read(uri)
            check(refused, "RESOURCE_EXHAUSTED", "QUEUE_FULL", uri, "--store-max-bytes")
        finally:
            ready.set()
        assert [call.result() for call in calls] == [None, None]
    eventually(disk, 0.0)
    assert series(served.server, FETCHED) - before == 2 * len(data)


TENANTS = """
[tenants.alice]
tokens = ["a token of alice's"]
[tenants.bob]
tokens = ["a token of bob's"]
"""


@pytest.fixture
def tenants(site: Site, tmp_path: Path) -> Iterator[list[secateur.Client]]:
    """Alice and bob, each of whom may have 4 of the 8 MiB."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TENANTS)
    options = ("--allow-uri", f"{site.root}/models", "--store-max-bytes", "8MiB")
    with (
        serving_here(*options, "--tokens-file", str(tokens)) as running,
        secateur.Client(running.server.address, "a token of alice's", timeout=300) as alice,
        secateur.Client(running.server.address, "a token of bob's", timeout=300) as bob,
    ):
        yield [alice, bob]


def test_fetches_of_one_tenant_leave_half_of_the_disk_to_others(
    site: Site, tenants: list[secateur.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = tenants
    slow, ready, asked = page(zeros(3 << 20)), threading.Event(), threading.Event()

    def waiting(request: BaseHTTPRequestHandler) -> None:
        if request.command == "GET":
            asked.set()
            ready.wait(300)
        slow(request)

    site.pages["/models/slow"], site.pages["/models/x"] = waiting, page(zeros(3 << 20))
    monkeypatch.setattr(Patience, "pause_after", lambda *error: None)
    with ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(alice.report, f"{site.root}/models/slow")
            assert asked.wait(300)
            with pytest.raises(secateur.ServerBusy, match="for this tenant") as refused:
                alice.report(f"{site.root}/models/x")
            assert refused.value.retry_after
            assert bob.report(f"{site.root}/models/x").zeros == 3 << 18
        finally:
            ready.set()
        assert first.result().zeros == 3 << 18
    assert alice.report(f"{site.root}/models/x").zeros == 3 << 18


def test_fetch_above_a_tenants_limit_is_refused_at_once(
    site: Site, tenants: list[secateur.Client]
) -> None:
    site.pages["/models/x"] = page(zeros(5 << 20))
    with pytest.raises(secateur.StoreFull, match="for one tenant"):
        tenants[0].report(f"{site.root}/models/x")
    assert site.asked == ["HEAD /models/x"]


# Redirects -----------------------------------------------------------------------------------


def redirect(to: str, status: int = 302) -> Answer:
    return lambda request: answer(request, status, b"", Location=to, Content_Length="0")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Site]:
    """Another site, which the operator has not listed: it has a model."""
    made = Site()
    made.pages = {"/models/secret": page(DATA), "/models/back": page(DATA)}
    yield made
    made.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_within_allowed_uris_is_followed(served: Served, site: Site, status: int) -> None:
    site.pages["/models/a"] = redirect("/models/b", status)
    site.pages["/models/b"] = redirect(f"{site.root}/models/model?signature=x", status)
    site.pages["/models/model?signature=x"] = page(DATA)
    of_uri = served.client.prune(f"{site.root}/models/a", HALF)
    assert_same_tensors(of_uri.masks, served.client.prune(MODEL, HALF).masks)


@pytest.mark.parametrize(
    "target",
    [
        "{elsewhere}/models/secret",
        "{elsewhere}/models/secret?token=hidden",
        "//{host}/models/secret",
        "/private/secret",
        "https://{own}/models/secret",
        "../private/secret",
        "/models/../private/secret",
        "/models/%2e%2e/private/secret",
        "/models/..%2fprivate/secret",
        "/models-private/secret",
        "http://user:hidden@{host}/models/secret",
    ],
)
@pytest.mark.parametrize("hops", [0, 1])
def test_a_redirect_elsewhere_is_refused(
    served: Served, site: Site, elsewhere: Site, target: str, hops: int
) -> None:
    """Also behind a redirect that is allowed; nothing is asked there."""
    elsewhere.asked.clear()
    host, own = (root.removeprefix("http://") for root in (elsewhere.root, site.root))
    site.pages["/models/last"] = redirect(
        target.format(elsewhere=elsewhere.root, host=host, own=own)
    )
    site.pages["/models/first"] = redirect("/models/last")
    uri = f"{site.root}/models/{'first' if hops else 'last'}"
    for found in (served.read(uri), served.read(uri, "Finalize")):
        check(found, "PERMISSION_DENIED", "URI_NOT_ALLOWED", uri, "redirects to", "secret")
        assert found is not None
        assert "hidden" not in found.message
    assert not elsewhere.asked
    assert not [asked for asked in site.asked if "secret" in asked]


def test_redirect_of_a_range_request_is_refused_too(
    served: Served, site: Site, elsewhere: Site
) -> None:
    """The size came from where it is allowed."""
    elsewhere.asked.clear()

    def changing(request: BaseHTTPRequestHandler) -> None:
        is_range = "Range" in request.headers
        (redirect(f"{elsewhere.root}/models/secret") if is_range else page(DATA))(request)

    site.pages["/models/x"] = changing
    uri = f"{site.root}/models/x"
    check(served.read(uri), "PERMISSION_DENIED", "URI_NOT_ALLOWED", uri, "redirects to")
    assert not elsewhere.asked


def test_redirect_is_followed_within_the_tenants_uris_only(site: Site, tmp_path: Path) -> None:
    """Other URIs that the server allows are for other tenants."""
    scratch = Scratch(tmp_path, 1 << 20, lambda count: None)
    everywhere = Uris((), (f"{site.root}/models",), scratch, Requests(300))
    tenants = everywhere.among([f"{site.root}/models/mine"])
    site.pages["/models/mine/x"] = redirect("/models/others/x")
    site.pages["/models/others/x"] = page(DATA)
    uri = f"{site.root}/models/mine/x"
    with everywhere.open(RequestContext(), "uri", uri) as model, model.fetched() as (file,):
        assert bytes(file.data) == DATA
    with (
        pytest.raises(UriNotAllowed, match="/models/others/x"),
        tenants.open(RequestContext(), "uri", uri),
    ):
        pass


def test_remote_without_ranges_does_not_fill_memory(served: Served, site: Site) -> None:
    """Whatever size it reported."""
    data = zeros(9 << 20)

    def whole(request: BaseHTTPRequestHandler) -> None:
        if request.command == "HEAD":
            answer(request, 200, b"", Content_Length="1000")
        else:
            with suppress(OSError):
                answer(request, 200, data, Content_Length=str(len(data)))

    site.pages["/models/x"] = whole
    uri = f"{site.root}/models/x"
    check(served.read(uri), "FAILED_PRECONDITION", "URI_FAILED", uri, "range")
