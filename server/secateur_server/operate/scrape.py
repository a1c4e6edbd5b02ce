"""The address that Prometheus scrapes."""

import hmac
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socket import AF_INET6
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

log = logging.getLogger(__name__)

# Of a scraper that says nothing.
TIMEOUT_SECONDS = 10.0

App = Callable[[Any, Any], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128  # of the 5 that there are else, silent strangers leave none

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who says nothing, or leaves, is no news either."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a scrape failed")


class _Server6(_Server):
    address_family = AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = TIMEOUT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


def serve_metrics(
    host: str, port: int, registry: CollectorRegistry, token: Path | None
) -> WSGIServer:
    """Serves /metrics from a thread.

    token: a file with what scrapers have to send as a bearer token, read each time.
    Errors: OSError.
    """
    kind = _Server6 if ":" in host else _Server
    app = _only_metrics(make_wsgi_app(registry), token)
    server = make_server(host, port, app, kind, handler_class=_Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _only_metrics(metrics: App, token: Path | None) -> App:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            return _refused(start_response, "404 Not Found", "metrics are at /metrics")
        if token is not None and not _is_known(environ.get("HTTP_AUTHORIZATION", ""), token):
            return _refused(start_response, "401 Unauthorized", "a bearer token is needed")
        return metrics(environ, start_response)

    return app


def _is_known(authorization: str, token: Path) -> bool:
    try:
        wanted = token.read_bytes().strip()
    except OSError:  # a scraper that is let in by a lost file would be a hole
        return False
    scheme, _, given = authorization.partition(" ")
    sent = given.strip().encode("latin-1")  # as WSGI has the bytes of headers
    return bool(wanted) and scheme.lower() == "bearer" and hmac.compare_digest(sent, wanted)


def _refused(start_response: Any, status: str, text: str) -> list[bytes]:
    headers = [("Content-Type", "text/plain")]
    if status.startswith("401"):
        headers.append(("WWW-Authenticate", "Bearer"))
    start_response(status, headers)
    return [f"{text}\n".encode()]
