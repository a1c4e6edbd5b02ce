"""A private server in this process."""

import atexit
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from secateur.checks import timeout_of
from secateur.client import Client
from secateur.cycles import no_search_for_cycles
from secateur.errors import SecateurError


@contextmanager
def embedded(device: str = "auto", timeout: float | None = None) -> Iterator[Client]:
    """Starts a private server, and stops it when the block ends. Needs secateur[server].

    The server listens at a Unix socket that only this user can reach, and serves no metrics. It
    opens every file:// URI that this user can, keeps checkpoints until the block ends, and has the
    default limits of secateur-server.

    Args:
        device: auto, cpu, cuda or cuda:N.
        timeout: See `Client`.

    Yields:
        A client of the server.

    Raises:
        SecateurError: The server does not start.
    """
    seconds = timeout_of(timeout)
    with ExitStack() as opened:
        address = f"unix:{opened.enter_context(_private_folder())}/socket"
        opened.enter_context(_started(address, device))
        client = opened.enter_context(Client(address, timeout=seconds))
        with _closed_at_exit(opened):
            yield client


@contextmanager
def _closed_at_exit(opened: ExitStack) -> Iterator[None]:
    """Closes a stack at the exit of a process that never ends the block.

    The interpreter would end the block after the threads that a server needs to stop.
    """
    atexit.register(opened.close)
    try:
        yield
    finally:
        atexit.unregister(opened.close)


@no_search_for_cycles()  # importing torch makes 180,000 objects
def _started(address: str, device: str) -> AbstractContextManager[object]:
    """Starts a server, which the returned context manager stops."""
    try:
        from secateur_server.app import App
        from secateur_server.config import BadConfig, parse_config
    except ImportError as error:
        raise SecateurError(
            f"an embedded server needs the server's packages, and {error.name} is missing: "
            "pip install 'secateur[server]', or use a server: --server, secateur.Client(ADDRESS)"
        ) from error
    arguments = ["--address", address, "--metrics-address", "", f"--device={device}"]
    arguments += ["--allow-path", "/"]  # only this user reaches the server
    try:
        return App(parse_config(arguments, {}), is_warm=False)
    except BadConfig as error:
        raise SecateurError(f"the embedded server does not start: {error}") from None
    except Exception as error:  # CannotStart, or an error of torch's on the device
        raise SecateurError(f"the embedded server does not start: {error}") from error


@contextmanager
def _private_folder() -> Iterator[str]:
    """A temporary folder of mode 0700."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="secateur-")
    except OSError as error:
        raise SecateurError(
            f"the embedded server does not start: {error.filename}: {error.strerror}"
        ) from None
    with folder as path:
        yield path
