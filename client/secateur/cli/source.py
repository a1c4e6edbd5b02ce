"""The server and the model that the options of a command name."""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from secateur.channel import TlsFiles
from secateur.client import Client
from secateur.embedded import embedded
from secateur.errors import SecateurError
from secateur.model import Source
from secateur.paths import path_of
from secateur.source import read_source


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Client, Source]]:
    """Reads IN, and connects to the server, or starts an embedded one.

    A file is read first: if it is wrong, the command fails before torch is imported for a server.

    Raises:
        SecateurError: The model cannot be read, or there is no server for it.
    """
    local = None if _is_checkpoint(options.model) else read_source(options.model, options.key)
    with connected(options) as client:
        yield client, local or source_of(client, options)


def source_of(client: Client, options: argparse.Namespace) -> Source:
    """Reads IN: a checkpoint's name, a URI, or a local file."""
    is_named = _is_checkpoint(options.model)
    source = client.checkpoint(options.model) if is_named else options.model
    return read_source(source, options.key)


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


def _is_checkpoint(model: str) -> bool:
    """Whether IN names a checkpoint. If a local file has that path, the file wins."""
    return model.startswith("checkpoints/") and not path_of(model).exists()


def connected(options: argparse.Namespace) -> AbstractContextManager[Client]:
    """Connects to the server that the options name, or starts an embedded one.

    Raises:
        SecateurError: The options name no server for a model that needs one, or are wrong.
    """
    if options.server:
        return client_of(options)
    if _is_checkpoint(options.model):
        raise SecateurError(
            f"{options.model}: no such file exists; if it is a checkpoint, name its server with "
            "--server or SECATEUR_SERVER"
        )
    for place in (options.model, getattr(options, "out", None) or ""):
        if "://" in place and not place.startswith("file://"):
            raise SecateurError(
                f"{place}: without a server only file:// URIs can be opened: give --server, or "
                "use a local copy of the file"
            )
    return embedded(timeout=options.timeout)


def _tls_of(options: argparse.Namespace) -> TlsFiles | None:
    paths = options.tls_ca, options.tls_key, options.tls_cert
    return TlsFiles(*paths) if options.tls or any(paths) else None
