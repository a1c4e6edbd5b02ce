"""TLS certificates, which are reread when their files change."""

import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

    def version(self) -> tuple[bytes | None, ...]:
        """The content of the files, to detect changes."""
        paths = (self.cert, self.key, self.client_ca)
        return tuple(path.read_bytes() if path else None for path in paths)

    def load(self) -> Any:
        """Loads the files for gRPC.

        Raises:
            BadCertificate: A file cannot be read, or the files do not match.
        """
        at = f"{self.cert} and {self.key}"
        try:
            _check_pem(self.cert, b"CERTIFICATE")
            _check_pem(self.key, b"PRIVATE KEY")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without this callback, OpenSSL would ask for a password on the terminal.
            context.load_cert_chain(self.cert, self.key, password=_no_password)
            if self.client_ca:
                at = f"{self.client_ca}"
                _check_pem(self.client_ca, b"CERTIFICATE")
                context.load_verify_locations(self.client_ca)
            cert, key, client_ca = self.version()
        except ssl.SSLError as error:
            raise BadCertificate(f"{at}: {error.reason or error}") from None
        except OSError as error:
            raise BadCertificate(f"{error.filename or at}: {error.strerror}") from None
        assert cert is not None, "required"
        assert key is not None, "required"
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _check_pem(path: Path, kind: bytes) -> None:
    """Raises BadCertificate with the name of the file, which OpenSSL's error lacks."""
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind, path.read_bytes()):
        raise BadCertificate(f"{path}: does not contain a {kind.decode().lower()} in PEM")


def _no_password() -> bytes:
    raise BadCertificate("the private key has a password; remove it")


def _seen(files: TlsFiles) -> tuple[bytes | None, ...] | None:
    """The content of the files; None if one cannot be read."""
    try:
        return files.version()
    except OSError:  # `load` reports it
        return None


def server_credentials(files: TlsFiles, reloaded: Callable[[bool], None]) -> grpc.ServerCredentials:
    """Credentials that are reloaded, if their files have changed, when a connection begins.

    Args:
        files: Of the certificate.
        reloaded: Called each time that the files have changed, with whether they could be used.

    Raises:
        BadCertificate: A file cannot be read, or the files do not match.
    """
    loaded = Reloaded(f"certificate {files.cert}", partial(_seen, files), files.load, reloaded)
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
