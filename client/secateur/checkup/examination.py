"""All checks, in their order."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import grpc

from secateur.calls.connection import settings_of
from secateur.channel import TlsFiles, open_channel
from secateur.checkup.check import Check, Clock, failed
from secateur.checkup.embedded import check_embedded
from secateur.checkup.network import check_connection, check_tls
from secateur.checkup.service import check_service
from secateur.errors import SecateurError
from secateur.versions import VERSION

_PACKAGES = ("grpcio", "protobuf", "numpy", "torch", "numba")


def checkup(
    address: str | None, token: str | None, tls: TlsFiles | None, insecure: bool, seconds: float
) -> Iterator[Check]:
    """Checks this installation, and the server at an address.

    Args:
        address: See `Client`; None checks no server.
        token: See `Client`.
        tls: See `Client`.
        insecure: See `Client`.
        seconds: The most that all checks may take.

    Yields:
        The checks, as they are done. After one that failed, those that depend on it are left out.
    """
    clock = Clock(seconds)
    yield _client()
    if address:
        yield from check_server(address, token, tls, insecure, clock)
    yield check_embedded(clock, is_needed=not address)


def _client() -> Check:
    """The versions of this process."""
    versions = [f"secateur {VERSION}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return Check("client", "ok", ", ".join(versions))


def check_server(
    address: str, token: str | None, tls: TlsFiles | None, insecure: bool, clock: Clock
) -> Iterator[Check]:
    """Checks the server at an address; see `checkup`."""
    try:
        settings = settings_of(address, token, tls, None, False, insecure)
    except SecateurError as error:
        yield failed("options", str(error), "check --server, --token and the options of TLS")
        return
    target = settings.target
    if target is None:
        return
    for check in check_connection(target, clock):
        yield check
        if check.status == "fail":
            return
    if tls is not None:
        yield (check := check_tls(target, tls, clock))
        if check.status == "fail":
            return
    with open_channel(grpc, target, settings.credentials) as channel:
        yield from check_service(channel, target, token, clock)
