"""TLS certificates, which are reread when their files change."""

import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from secateur_server.operate.reload import Reloaded, Unusable


class BadCertificate(Unusable):
    """The files of TLS cannot be read, or do not match."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.

    Attributes:
        cert: The server's certificate, and its intermediate certificates.
        key: Its private key.
        client_ca: The CA of client certificates; None: clients need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def load(self) -> Any:
        """Loads the files for gRPC.

        Raises:
            BadCertificate: A file cannot be read, or the files do not match.
        """
        at, client_ca = f"{self.cert} and {self.key}", None
        try:
            cert = _read_pem(self.cert, b"CERTIFICATE")
            key = _read_pem(self.key, b"PRIVATE KEY")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without this callback, OpenSSL would ask for a password on the terminal.
            context.load_cert_chain(self.cert, self.key, password=_no_password)
            if self.client_ca:
                at = f"{self.client_ca}"
                client_ca = _read_pem(self.client_ca, b"CERTIFICATE")
                context.load_verify_locations(self.client_ca)
        except ssl.SSLError as error:
            raise BadCertificate(f"{at}: {error.reason or error}") from None
        except OSError as error:
            raise BadCertificate(f"{error.filename or at}: {error.strerror}") from None
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _read_pem(path: Path, kind: bytes) -> bytes:
    """Reads a file. Raises BadCertificate with its name, which OpenSSL's error lacks."""
    content = path.read_bytes()
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind, content):
        raise BadCertificate(f"{path}: does not contain a {kind.decode().lower()} in PEM")
    return content


def _no_password() -> bytes:
    raise BadCertificate("the private key has a password; remove it")


def server_credentials(files: TlsFiles, reloaded: Callable[[bool], None]) -> grpc.ServerCredentials:
    """Credentials that are reloaded, if their files have changed, when a connection begins.

    Args:
        files: The certificate and its key.
        reloaded: Called each time that the files have changed, with whether they could be used.

    Raises:
        BadCertificate: A file cannot be read, or the files do not match.
    """
    paths = [path for path in (files.cert, files.key, files.client_ca) if path]
    loaded = Reloaded(f"certificate {files.cert}", paths, files.load, reloaded)
    first = served = loaded.value()
    lock = threading.Lock()  # or a concurrent connection could restore an older one

    def fetch() -> Any:
        nonlocal served
        with lock:
            if (now := loaded.value()) is served:
                return None
            served = now
            return now

    return grpc.dynamic_ssl_server_credentials(
        first, fetch, require_client_authentication=files.client_ca is not None
    )
