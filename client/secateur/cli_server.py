"""The options that name a server."""

import argparse
import math
import os

from secateur.channel import TlsFiles
from secateur.client import Client
from secateur.errors import SecateurError


def server_options(command: argparse.ArgumentParser, default: str) -> None:
    """Adds --server, --token, --timeout and those of TLS."""
    command.add_argument(
        "--server",
        metavar="ADDRESS",
        default=os.environ.get("SECATEUR_SERVER"),
        help=f"HOST:PORT of a server (default: $SECATEUR_SERVER, {default})",
    )
    command.add_argument(
        "--token",
        default=os.environ.get("SECATEUR_TOKEN"),
        help="authenticates you to the server (default: $SECATEUR_TOKEN)",
    )
    command.add_argument(
        "--tls",
        action="store_true",
        help="speak TLS, and trust the authorities that this machine trusts",
    )
    command.add_argument(
        "--tls-ca",
        metavar="FILE",
        default=os.environ.get("SECATEUR_TLS_CA"),
        help="speak TLS, and trust these authorities: PEM (default: $SECATEUR_TLS_CA)",
    )
    command.add_argument("--tls-cert", metavar="FILE", help="your certificate: PEM")
    command.add_argument("--tls-key", metavar="FILE", help="its private key: PEM")
    command.add_argument(
        "--insecure", action="store_true", help="send the token to another machine without TLS"
    )
    command.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="fail after so many seconds"
    )


def seconds(text: str) -> float:
    """Parses a time.

    Raises:
        argparse.ArgumentTypeError: It is not a number above 0.
    """
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def client_of(options: argparse.Namespace) -> Client:
    """Connects to the server that the options name.

    Raises:
        SecateurError: They name none, or are wrong.
    """
    if not options.server:
        raise SecateurError("checkpoints are on a server: give --server, or set SECATEUR_SERVER")
    return Client(
        options.server,
        token=options.token,
        tls=_tls_of(options),
        timeout=options.timeout,
        insecure=options.insecure,
    )


def _tls_of(options: argparse.Namespace) -> TlsFiles | None:
    paths = options.tls_ca, options.tls_key, options.tls_cert
    return TlsFiles(*paths) if options.tls or any(paths) else None
