"""The HTTP server of /metrics, which Prometheus scrapes.

One thread serves all connections. At most MAX_CONNECTIONS are open: a new one replaces the oldest,
once the oldest has had GRACE_SECONDS to send its request. So connections of strangers take neither
threads nor file descriptors from gRPC, and a burst of them does not cut off a scraper.
"""

import asyncio
import hmac
import logging
import socket
import threading
from contextlib import suppress
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import choose_encoder

log = logging.getLogger(__name__)

# Seconds after which a scraper that sends or takes nothing is cut off.
TIMEOUT_SECONDS = 10.0
# Seconds to wait when the process has no free file descriptor for a new connection.
RETRY_SECONDS = 1.0

MAX_CONNECTIONS = 32
GRACE_SECONDS = 0.5
MAX_HEAD_BYTES = 16 << 10


class MetricsServer:
    """Serves /metrics from a thread of its own.

    Args:
        host: An address or a name of this machine.
        port: 0: a free port.
        registry: The metrics.
        token: A file with the bearer token that scrapers must send, which is read for each scrape;
            None: no token is needed.

    Attributes:
        port: The port in use.

    Raises:
        OSError: The address cannot be used.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, token: Path | None
    ) -> None:
        self._app, self._token = make_wsgi_app(registry), token
        self._listening = _listen(host, port)
        self.port: int = self._listening.getsockname()[1]
        # Each with the time of the event loop at which it was accepted, the oldest first.
        self._connections: dict[asyncio.Task[None], float] = {}
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Closes all connections and the port."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError), self._listening:
            self._loop.run_until_complete(self._accepting)
        while self._connections:
            self._loop.run_until_complete(self._end_oldest())
        self._loop.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError:  # no free file descriptor, or the peer has disconnected
                await asyncio.sleep(RETRY_SECONDS)
                continue
            connection.setblocking(False)
            task = self._loop.create_task(self._serve(connection))
            self._connections[task] = self._loop.time()
            task.add_done_callback(lambda ended: self._connections.pop(ended, None))
            while len(self._connections) >= MAX_CONNECTIONS:
                await self._wait_for_place()
            await asyncio.sleep(0)  # lets other connections run, however many arrive

    async def _wait_for_place(self) -> None:
        """Waits until a connection ends. Ends the oldest one when its grace is over."""
        left = next(iter(self._connections.values())) + GRACE_SECONDS - self._loop.time()
        if left <= 0:
            await self._end_oldest()
        else:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(self._connections, timeout=left, return_when=first)
            await asyncio.sleep(0)  # lets the callbacks of ended connections run

    async def _end_oldest(self) -> None:
        oldest = next(iter(self._connections))
        del self._connections[oldest]
        oldest.cancel()
        await asyncio.wait([oldest])

    async def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(TIMEOUT_SECONDS):
                head = await self._head(connection)
                await self._loop.sock_sendall(connection, self._answer(head))
                connection.shutdown(socket.SHUT_WR)
                # Closing before the peer does would reset the connection if more data arrives.
                while await self._loop.sock_recv(connection, MAX_HEAD_BYTES):
                    pass

    async def _head(self, connection: socket.socket) -> bytes:
        """The request line and the headers, up to MAX_HEAD_BYTES."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
            data = await self._loop.sock_recv(connection, MAX_HEAD_BYTES)
            if not data:
                break
            head += data
            if not head[:1].isalpha():  # a TLS client, which waits for an answer in TLS
                break
        return head

    def _answer(self, head: bytes) -> bytes:
        request, end, _ = head.partition(b"\r\n\r\n")
        if not end:
            return _response("400 Bad Request", [])
        try:
            return self._respond(_environ(request.decode("latin-1")))
        except Exception:
            log.exception("a scrape failed")
            return _response("500 Internal Server Error", [])

    def _respond(self, environ: dict[str, str]) -> bytes:
        plain = ("Content-Type", "text/plain")
        if self._token is not None and not _is_known(environ["HTTP_AUTHORIZATION"], self._token):
            headers = [plain, ("WWW-Authenticate", "Bearer")]
            return _response("401 Unauthorized", headers, b"a bearer token is needed\n")
        if environ["PATH_INFO"] != "/metrics":
            return _response("404 Not Found", [plain], b"metrics are at /metrics\n")
        started: list[Any] = []
        body = b"".join(self._app(environ, lambda *arguments: started.extend(arguments)))
        status, headers = started
        return _response(status, headers, body)


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def _environ(head: str) -> dict[str, str]:
    """The request line and the headers as WSGI has them."""
    request, _, lines = head.partition("\r\n")
    method, target, *_ = (*request.split(), "", "")
    path, _, query = target.partition("?")
    headers = HeaderParser().parsestr(lines)
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path, "latin-1"),
        "QUERY_STRING": query,
        "HTTP_AUTHORIZATION": headers.get("Authorization", ""),
        "HTTP_ACCEPT": _accepted(headers.get("Accept", "")),
        "HTTP_ACCEPT_ENCODING": headers.get("Accept-Encoding", ""),
    }


def _accepted(accept: str) -> str:
    """The header Accept, or an empty text where prometheus_client cannot read it."""
    try:
        choose_encoder(accept)
    except (TypeError, ValueError):
        return ""
    return accept


def _response(status: str, headers: list[tuple[str, str]], body: bytes = b"") -> bytes:
    headers = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status}\r\n{fields}\r\n".encode() + body


def _is_known(authorization: str, token: Path) -> bool:
    try:
        wanted = token.read_bytes().strip()
    except OSError:  # without the file, nobody is let in
        return False
    scheme, _, given = authorization.partition(" ")
    sent = given.strip().encode("latin-1")  # as WSGI has the bytes of headers
    return bool(wanted) and scheme.lower() == "bearer" and hmac.compare_digest(sent, wanted)
