"""An HTTP proxy before an object store, which fails or waits as a test says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# Says whether a request fails: its method and its path with the query.
Fault = Callable[[str, str], bool]

NOT_NOW = b"<Error><Code>ServiceUnavailable</Code><Message>not now</Message></Error>"


class Proxy:
    """Passes requests on to a store.

    Attributes:
        endpoint: The URL of the proxy.
        fails: Which requests are answered with 503.
        waits: Which requests get no answer. They wait until `released`, and do not reach the store.
        waiting: How many did so far.
    """

    def __init__(self, store: str) -> None:
        self.store = urlsplit(store)
        self.reset()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.fails: Fault = lambda method, path: False
        self.waits: Fault = lambda method, path: False
        self.waiting = 0
        self.released = threading.Event()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxied(store: str) -> Iterator[Proxy]:
    """A proxy for a block."""
    proxy = Proxy(store)
    try:
        yield proxy
    finally:
        proxy.close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if proxy.waits(self.command, self.path):
                proxy.waiting += 1
                proxy.released.wait(300)
                self.close_connection = True
                return
            if proxy.fails(self.command, self.path):
                self.answer(503, {"Content-Type": "application/xml"}, NOT_NOW)
                return
            connection = HTTPConnection(str(proxy.store.netloc), timeout=300)
            connection.request(self.command, self.path, body, dict(self.headers))
            found = connection.getresponse()
            self.answer(found.status, dict(found.headers), found.read())
            connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            kept = {
                k: v for k, v in headers.items() if k not in ("Transfer-Encoding", "Connection")
            }
            if self.command != "HEAD":
                kept["Content-Length"] = str(len(body))
            for name, value in kept.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the caller has given up
                self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
