"""A server of this process's own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from secateur.client import Client
from secateur.errors import SecateurError


@contextmanager
def embedded(device: str = "auto", timeout: float | None = None) -> Iterator[Client]:
    """A client of a private server, which ends with the block. Needs secateur[server].

    device: auto, cpu, cuda or cuda:N.  The server listens at a Unix socket that only this user can
    reach, serves no metrics, opens every file:// URI that this user can, keeps checkpoints until
    the block ends, and has the limits of secateur-server's defaults.
    """
    try:
        from secateur_server.app import App
        from secateur_server.config import read_config
    except ImportError as error:
        raise SecateurError(
            f"an embedded server needs {error.name}: pip install 'secateur[server]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:  # mode 0700
        address = f"unix:{folder}/socket"
        arguments = ["--address", address, "--metrics-address", "", "--device", device]
        arguments += ["--allow-path", "/"]  # what this user may read and write, and nobody else
        with (
            App(read_config(arguments, {}), is_warm=False),
            Client(address, timeout=timeout) as client,
        ):
            yield client
