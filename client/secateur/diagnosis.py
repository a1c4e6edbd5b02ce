"""Explains why a call reached no server, after a short probe of the address."""

import socket
import ssl
import threading
import time
from dataclasses import dataclass

from secateur.address import DEFAULT_PORT, GRPC_PORT, Address
from secateur.errors import DeadlineExceeded, Unavailable

# The most seconds of a probe, and of one after a deadline was exceeded.
_SECONDS, _SECONDS_IF_LATE = 2.0, 0.5

# In gRPC's message for a call that ended with the server.
_SHUT_DOWN = ("Cancelling all calls", "Server shutdown")

# The first bytes of an HTTP/2 client: the preface, and an empty SETTINGS frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


@dataclass(frozen=True)
class Target:
    """A server to connect to.

    Attributes:
        address: The server's address.
        has_tls: Whether the connection is over TLS.
    """

    address: Address
    has_tls: bool = False


def explained(
    error: Unavailable | DeadlineExceeded,
    target: Target | None,
    timeout: float | None,
    is_known: bool,
) -> Unavailable | DeadlineExceeded:
    """Returns an error with advice in place of one of a call that reached no server.

    Args:
        error: The error; it is returned if there is no advice.
        target: The server; None if the caller gave a channel.
        timeout: The call's timeout in seconds; the probe takes 0.5 s more at most.
        is_known: Whether the server answered an earlier call: then a deadline needs no probe.
    """
    if error.request_id is not None:  # a server answered
        return error
    is_late = isinstance(error, DeadlineExceeded)
    advice = None
    if any(words in str(error) for words in _SHUT_DOWN):
        advice = "the server shut down during the call: send it again"
    elif target is not None and not (is_late and is_known):
        advice = advice_on(target, _SECONDS_IF_LATE if is_late else _SECONDS, str(error))
    if is_late:
        late = f"not done within the timeout of {timeout:g} s" if timeout else "not done in time"
        advice = f"{late}; {advice}" if advice else late
    return error if advice is None else type(error)(f"{advice} ({error})")


def advice_on(target: Target, seconds: float, said: str = "") -> str | None:
    """Returns what is probably wrong with an address, and what to do.

    Args:
        target: The server.
        seconds: The most that the probe may take.
        said: gRPC's error message.

    Returns:
        None if nothing seems wrong.
    """
    found: list[str | None] = []
    probe = _Probe(target, time.monotonic() + seconds, said)
    # A thread, since DNS look-ups have no time limit of their own.
    thread = threading.Thread(target=lambda: found.append(probe.advice()), daemon=True)
    thread.start()
    thread.join(seconds + 0.1)
    return found[0] if found else f"{target.address.text} does not answer"


class _Probe:
    """Connects once or twice, and reads the first bytes of the other side."""

    def __init__(self, target: Target, end: float, said: str) -> None:
        self._target, self._end, self._said = target, end, said
        address = target.address
        self._place = (address.host, address.port or GRPC_PORT)
        self._text = f"{address.host}:{address.port or GRPC_PORT}"

    def advice(self) -> str | None:
        address = self._target.address
        if not (address.host or address.path):
            return None
        try:
            return self._of_tls() if self._target.has_tls else self._of_greeting(None, _TLS)
        except (socket.gaierror, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            return f"{address.host!r} cannot be resolved ({reason}): check the name of the host"
        except TimeoutError:
            return f"{address.text} does not answer: check the host, the port and firewalls"
        except OSError as error:
            return self._of_refusal(error)

    def _of_refusal(self, error: OSError) -> str:
        address = self._target.address
        if address.path:
            return f"no server listens at {address.text}: {error.strerror}"
        if address.port is None:
            return (
                f"{address.text!r} has no port, and no server listens at {GRPC_PORT}, gRPC's "
                f"default ({error.strerror}): give HOST:PORT, as {address.text}:{DEFAULT_PORT}"
            )
        reason = error.strerror or type(error).__name__
        return f"no server listens at {self._text} ({reason}): start one, or check host and port"

    def _of_tls(self) -> str | None:
        if "create security handshaker" in self._said:
            return "a file for TLS is not valid PEM: check tls= (--tls-ca, --tls-cert, --tls-key)"
        for words, advice in _CERTIFICATES.items():
            if words in self._said:
                return f"the certificate of {self._text} is not trusted: {advice}"
        try:
            with self._handshake() as connection:
                connection.sendall(_PREFACE)
                if connection.recv(1):
                    return None
                return f"{self._text} {_MUTUAL}"  # TLS 1.3 refuses a client only now
        except (ssl.SSLError, ConnectionError):
            return self._of_greeting(
                "does not speak TLS: leave out tls= (--tls, --tls-ca)", _MUTUAL
            )

    def _of_greeting(self, if_http2: str | None, if_tls: str) -> str | None:
        """The advice by what the other side answers without TLS."""
        first = self._greeting()
        if first is None:
            return (
                f"{self._target.address.text} takes connections, but does not answer: it may still "
                "be starting, for a minute or two the first time; else look into its log"
            )
        if _is_http2(first):
            return f"{self._text} {if_http2}" if if_http2 else None
        if self._speaks_tls():
            return f"{self._text} {if_tls}"
        return f"{self._text} {_HTTP1 if self._speaks_http1() else _NO_GRPC}"

    def _connect(self) -> socket.socket:
        path = self._target.address.path
        if not path:
            return socket.create_connection(self._place, timeout=self._left())
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self._left())
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            raise
        return connection

    def _greeting(self) -> bytes | None:
        """The first bytes that the other side sends to an HTTP/2 client; None if it is silent."""
        try:
            return self._answer(_PREFACE)
        except TimeoutError:
            return None

    def _speaks_http1(self) -> bool:
        return self._answer(b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1")

    def _answer(self, request: bytes) -> bytes:
        """The first bytes of an answer; empty if the other side closes the connection."""
        with self._connect() as connection:
            try:
                connection.sendall(request)
                return connection.recv(64)
            except ConnectionError:
                return b""

    def _handshake(self) -> ssl.SSLSocket:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with self._connect() as connection:
            return context.wrap_socket(connection, server_hostname=self._place[0] or None)

    def _speaks_tls(self) -> bool:
        try:
            self._handshake().close()
        except (ssl.SSLError, ConnectionError):
            return False
        return True

    def _left(self) -> float:
        return max(0.01, self._end - time.monotonic())


_HTTP1 = (
    "speaks HTTP/1, and not gRPC: it may be the server's metrics port; its gRPC port is "
    f"{DEFAULT_PORT} by default"
)
_TLS = "speaks TLS, and this client does not: give tls=True or tls=CA_FILE (--tls or --tls-ca)"
_NO_TLS = "does not speak TLS: leave out tls= (--tls, --tls-ca)"
_NO_GRPC = "is not a gRPC server: check host and port"
_MUTUAL = (
    "takes only callers with a certificate that it trusts: give one (--tls-cert and --tls-key; in "
    "Python tls=grpc.ssl_channel_credentials(...))"
)
# Keys are parts of gRPC's messages on handshakes; the first that fits counts.
_CERTIFICATES = {
    "certificate has expired": "it has expired: renew it on the server",
    "Hostname Verification": "it is for another name: connect by a name that it has",
    "CERTIFICATE_VERIFY_FAILED": (
        "another authority signed it: give that authority's file, tls=CA_FILE (--tls-ca)"
    ),
}


def _is_http2(first: bytes) -> bool:
    """Whether an answer begins with a SETTINGS frame, as that of every HTTP/2 server."""
    return len(first) > 3 and first[3] == _SETTINGS
