"""Parses the address of a server."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError
from secateur.tensors import is_text

DEFAULT_PORT = 50051
GRPC_PORT = 443  # of an address without a port, by gRPC

_OTHER_SCHEMES = ("unix-abstract", "vsock", "xds", "google-c2p")


@dataclass(frozen=True)
class Address:
    """The address of a server.

    Attributes:
        text: As the caller gave it.
        host: Empty for addresses that are not of one host: a socket, or a scheme such as xds.
        port: None if the address has none.
        path: The path of a Unix socket.
    """

    text: str
    host: str = ""
    port: int | None = None
    path: str = ""

    @property
    def is_local(self) -> bool:
        """Whether data sent there does not leave this machine."""
        if self.path or self.text.startswith("unix-abstract:"):
            return True
        if self.host == "localhost":
            return True
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:  # a host name may resolve to any address
            return False
        return found.is_loopback or found.is_unspecified


def parse_address(text: Any) -> Address:
    """Parses an address.

    Args:
        text: HOST:PORT, unix:PATH, or another address of gRPC's, such as dns:///HOST:PORT.

    Raises:
        SecateurError: gRPC has no such address.
    """
    if not is_text(text) or not re.fullmatch(r"[!-~]+|unix:[^\0]+", text):
        raise SecateurError(f"address: {text!r} is not HOST:PORT or unix:PATH")
    scheme, rest = _split_scheme(text)
    if scheme == "unix":
        return Address(text, path=rest.removeprefix("//"))
    if scheme in _OTHER_SCHEMES or "," in rest:  # several hosts
        return Address(text)
    host, port = _split_port(rest)
    if port and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise SecateurError(f"address: {text!r} has the port {port!r}, which is not in [1, 65535]")
    return Address(text, host, int(port) if port else None)


def _split_scheme(text: str) -> tuple[str, str]:
    """The scheme, empty for none, and the rest."""
    if found := re.match(r"([a-z][a-z0-9+.-]*)://(.*)", text, re.IGNORECASE):
        scheme, rest = found[1].lower(), found[2]
        if scheme == "dns":
            return scheme, rest.partition("/")[2]  # without the DNS server to ask
        if scheme in ("unix", *_OTHER_SCHEMES):
            return scheme, f"//{rest}"
        raise SecateurError(f"address: {text!r} is a URL; {_instead_of(scheme, rest)}")
    scheme, _, rest = text.partition(":")
    if scheme in ("dns", "ipv4", "ipv6", "unix", *_OTHER_SCHEMES) and not rest.isdecimal():
        return scheme, rest
    return "", text


def _instead_of(scheme: str, rest: str) -> str:
    """The advice for a URL."""
    place = rest.partition("/")[0] or "HOST:PORT"
    place = place if _split_port(place)[1] else f"{place}:{DEFAULT_PORT}"
    tls = " and tls=True (--tls)" if scheme in ("https", "grpcs") else ""
    return f"gRPC takes HOST:PORT: give {place!r}{tls}"


def _split_port(place: str) -> tuple[str, str]:
    """The host and the port of HOST:PORT, [HOST]:PORT, HOST or an IPv6 address."""
    if found := re.fullmatch(r"\[([^\]]*)\](?::(.*))?", place):
        return found[1], found[2] or ""
    if place.count(":") == 1:
        host, _, port = place.partition(":")
        return host, port
    return place, ""
