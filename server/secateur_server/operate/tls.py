"""Certificates, read again when their files change."""

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
    """Files that TLS cannot be served with."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.  client_ca: of the authorities that clients' certificates need; None asks none."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def version(self) -> tuple[bytes | None, ...]:
        """Changes with what is in the files."""
        paths = (self.cert, self.key, self.client_ca)
        return tuple(path.read_bytes() if path else None for path in paths)

    def load(self) -> Any:
        """What gRPC serves with.  Errors: BadCertificate."""
        at = f"{self.cert} and {self.key}"
        try:
            _check_pem(self.cert, b"CERTIFICATE")
            _check_pem(self.key, b"PRIVATE KEY")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without a password openssl would ask the terminal for one.
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
        assert cert is not None, "it is not optional"
        assert key is not None, "nor is this"
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _check_pem(path: Path, kind: bytes) -> None:
    """Errors: BadCertificate, naming the file, which OpenSSL does not."""
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind, path.read_bytes()):
        raise BadCertificate(f"{path}: is not PEM with a {kind.decode().lower()}")


def _no_password() -> bytes:
    raise BadCertificate("the private key has a password; it is to have none")


def _seen(files: TlsFiles) -> tuple[bytes | None, ...] | None:
    """Their version; None where one cannot be read."""
    try:
        return files.version()
    except OSError:  # to load them says what is wrong
        return None


def server_credentials(files: TlsFiles, reloaded: Callable[[bool], None]) -> grpc.ServerCredentials:
    """Credentials that follow their files: at the start of each connection they are looked at.

    reloaded: as of Reloaded.  Errors: BadCertificate.
    """
    loaded = Reloaded(f"certificate {files.cert}", partial(_seen, files), files.load, reloaded)
    first = served = loaded.value()
    lock = threading.Lock()  # of connections that begin at once, none is to bring back an older one

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
