"""The server and the models that a command line names."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import click

from secateur.channel import TlsFiles
from secateur.cli.options import Server
from secateur.client import Client
from secateur.embedded import embedded
from secateur.errors import SecateurError
from secateur.model import Source
from secateur.paths import path_of
from secateur.source import read_source

# Bytes of a file that torch prunes faster than numba's kernels are loaded, which takes 0.5 s.
SMALL_BYTES = 4 << 20


@contextmanager
def opened(
    model: str, key: str | None, server: Server, out: str | None = None
) -> Iterator[tuple[Client, Source]]:
    """Reads IN, and connects to the server, or starts an embedded one.

    A file is read first: if it is wrong, the command fails before torch is imported for a server.

    Args:
        model: IN.
        key: See `read_source`.
        server: The options that name a server.
        out: OUT, if the server may write it.

    Raises:
        SecateurError: The model cannot be read, or there is no server for it.
    """
    local = None if _is_checkpoint(model) else read_source(model, key)
    with connected(server, model, out) as client:
        yield client, local or source_of(client, model, key)


def source_of(client: Client, model: str, key: str | None) -> Source:
    """Reads IN: a checkpoint's name, a URI, or a local file."""
    return read_source(client.checkpoint(model) if _is_checkpoint(model) else model, key)


def client_of(server: Server) -> Client:
    """Connects to the server that the options name.

    Raises:
        SecateurError: They name none, or are wrong.
    """
    if not server.server:
        raise SecateurError("checkpoints are on a server: give --server, or set SECATEUR_SERVER")
    return Client(
        server.server,
        token=server.token,
        tls=tls_of(server),
        timeout=server.timeout,
        insecure=server.insecure,
    )


def _is_checkpoint(model: str) -> bool:
    """Whether IN names a checkpoint. If a local file has that path, the file wins."""
    return model.startswith("checkpoints/") and not path_of(model).exists()


def connected(server: Server, model: str, out: str | None = None) -> AbstractContextManager[Client]:
    """Connects to the server that the options name, or starts an embedded one.

    Raises:
        SecateurError: The options name no server for a model that needs one, or are wrong.
    """
    if server.server:
        return client_of(server)
    if _is_checkpoint(model):
        raise SecateurError(
            f"{model}: no such file exists; if it is a checkpoint, name its server with "
            "--server or SECATEUR_SERVER"
        )
    for place in (model, out or ""):
        if "://" in place and not place.startswith("file://"):
            raise SecateurError(
                f"{place}: without a server only file:// URIs can be opened: give --server, or "
                "use a local copy of the file"
            )
    if click.get_current_context().obj:  # the command owns the process
        _skip_kernels(Path(model))
    return embedded(timeout=server.timeout)


def _skip_kernels(model: Path) -> None:
    """Lets an embedded server prune a small file with torch alone, which gives the same bits."""
    with suppress(OSError, ValueError):  # the command reports a wrong path
        if model.is_file() and model.stat().st_size <= SMALL_BYTES:
            os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


def tls_of(server: Server) -> TlsFiles | None:
    """Returns the files for TLS; None for plaintext."""
    paths = server.tls_ca, server.tls_key, server.tls_cert
    return TlsFiles(*paths) if server.tls or any(paths) else None


Out = TypeVar("Out", str, str | None)


@contextmanager
def standard_streams(model: str, out: Out) -> Iterator[tuple[str, Out]]:
    """Replaces - by temporary .safetensors files: of standard input, and for standard output.

    Args:
        model: IN.
        out: OUT, which is written if the block ends without an error.

    Yields:
        IN and OUT, as paths.
    """
    if "-" not in (model, out):
        yield model, out
        return
    if out == "-" and sys.stdout.isatty():
        raise SecateurError("-o -: standard output is a terminal; redirect it: > OUT.safetensors")
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        source, target = (str(Path(folder, f"{name}.safetensors")) for name in ("in", "out"))
        if model == "-":
            _receive(source)
        try:
            yield source if model == "-" else model, target if out == "-" else out
        except SecateurError as error:
            text = str(error).replace(source, "standard input")
            error.args = (text.replace(target, "standard output"),)
            raise
        if out == "-":
            with open(target, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
            sys.stdout.buffer.flush()


def _receive(path: str) -> None:
    """Copies standard input to a file."""
    if sys.stdin.isatty():
        raise SecateurError("-: standard input is a terminal; redirect it: < IN.safetensors")
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
