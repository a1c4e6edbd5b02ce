"""Whether a server can be reached: names, connections and certificates."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from secateur.address import GRPC_PORT, Address
from secateur.channel import TlsFiles
from secateur.checkup.check import Check, Clock, failed
from secateur.diagnosis import Target, advice_on

# A certificate that expires sooner is a warning.
_DAYS = 30
_REACH = "check the host, the port and firewalls"


def check_connection(target: Target, clock: Clock) -> Iterator[Check]:
    """Checks that the name is known, and that something listens."""
    address = target.address
    if not (address.host or address.path):
        yield Check("connection", "ok", f"{address.text} is not of one host; gRPC finds them")
        return
    if address.path:
        yield _connected(target, clock)
        return
    found: list[str] = []
    # A thread, since look-ups have no time limit of their own.
    thread = threading.Thread(target=_look_up, args=(address, found), daemon=True)
    thread.start()
    thread.join(clock.step())
    if found:
        if set(found) != {address.host}:
            yield Check("dns", "ok", f"{address.host} is {', '.join(sorted(set(found)))}")
        yield _connected(target, clock)
    else:
        said = advice_on(target, clock.step()) or f"{address.host} is not found"
        yield failed("dns", said, "check the name of the host")


def _look_up(address: Address, found: list[str]) -> None:
    with suppress(OSError, UnicodeError):
        for *_, place in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
            found.append(str(place[0]))


def _connected(target: Target, clock: Clock) -> Check:
    begin = time.monotonic()
    try:
        _connect(target, clock).close()
    except OSError:
        said = advice_on(target, clock.step()) or f"{target.address.text} does not answer"
        return failed("connection", said, _REACH)
    seconds = time.monotonic() - begin
    return Check("connection", "ok", f"{target.address.text} accepts in {1e3 * seconds:.1f} ms")


def _connect(target: Target, clock: Clock) -> socket.socket:
    address = target.address
    if not address.path:
        place = (address.host, address.port or GRPC_PORT)
        return socket.create_connection(place, timeout=clock.step())
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(clock.step())
    try:
        connection.connect(address.path)
    except OSError:
        connection.close()
        raise
    return connection


def check_tls(target: Target, files: TlsFiles, clock: Clock) -> Check:
    """Checks that the server's certificate is trusted, of this name, and not about to expire."""
    try:
        context = _context(target, files)
    except OSError as error:  # files that are not there have been refused before
        said = f"the files for TLS do not fit ({error})"
        return Check("tls", "fail", said, "check --tls-ca, --tls-cert and --tls-key")
    try:
        certificate, protocol = _certificate(target, context, clock)
    except ssl.SSLCertVerificationError as error:
        return _refused(error, target, context, clock)
    except OSError as error:  # no TLS at all
        said = advice_on(target, clock.step()) or f"the handshake failed ({error})"
        return failed("tls", said, _REACH)
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    found = f"{protocol}, certificate for {_names(certificate)}, expires in {days:.0f} days"
    if days < _DAYS:
        return Check("tls", "warn", found, "renew the certificate on the server")
    return Check("tls", "ok", found)


def _context(target: Target, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    context.check_hostname = bool(target.address.host)
    context.set_alpn_protocols(["h2"])
    if files.cert:
        context.load_cert_chain(files.cert, files.key)
    return context


def _certificate(
    target: Target, context: ssl.SSLContext, clock: Clock
) -> tuple[Mapping[str, Any], str]:
    """The server's certificate, and the version of TLS."""
    name = target.address.host or None
    with (
        _connect(target, clock) as connection,
        context.wrap_socket(connection, server_hostname=name) as secured,
    ):
        return secured.getpeercert() or {}, secured.version() or ""


# By OpenSSL's numbers, X509_V_ERR_...
_EXPIRED = (9, 10)  # or not valid yet
_OTHER_NAME = (62, 64)


def _refused(
    error: ssl.SSLCertVerificationError, target: Target, context: ssl.SSLContext, clock: Clock
) -> Check:
    """What is wrong with a certificate that is not trusted."""
    if error.verify_code in _OTHER_NAME:
        context.check_hostname = False
        certificate, _ = _certificate(target, context, clock)
        found = f"the certificate is for {_names(certificate)}, not for {target.address.host}"
        return Check("tls", "fail", found, "connect by a name that the certificate has")
    if error.verify_code in _EXPIRED:
        advice = "renew the certificate on the server, and check the clocks"
    else:
        advice = "give the file of the authority that signed it: --tls-ca FILE"
    return Check("tls", "fail", f"the certificate is not trusted ({error.verify_message})", advice)


def _names(certificate: Mapping[str, Any]) -> str:
    names = [name for _, name in certificate.get("subjectAltName", ())]
    return ", ".join(names) or "no name"
