"""The entry point of the command secateur, outside the package: an import of that takes a second.

Ctrl-C during that second ends the command with one line.
"""

import gc
import io
import os
import signal
import sys
from importlib.util import find_spec
from typing import NoReturn


def run() -> NoReturn:
    """Runs the command."""
    _prepare_streams()
    # By default Python searches for reference cycles after each 700 new objects. The modules of
    # torch alone have 180,000, so that searches would take a fifth of a small command's time.
    gc.set_threshold(100_000)
    # torch would search all installed packages for plug-ins of devices that secateur does not use.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, _end)
    if not all(map(find_spec, ("click", "rich"))):
        os.write(2, b"secateur: the command needs more packages: pip install 'secateur[cli]'\n")
        os._exit(1)
    from secateur import cli

    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run()


def _prepare_streams() -> None:
    """Makes standard streams writable for any text, and opens those that the caller closed.

    Else a model or a socket would take the place of a closed one. Now standard input is empty,
    writing to standard output is an error, and what is written to stderr is lost.
    """
    for number, name, flags in ((0, "stdin", 0), (1, "stdout", 0), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, flags), number)
            stream = os.fdopen(number, "w" if number else "r", closefd=False)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A locale may lack characters of the names of tensors.
        sys.stdout.reconfigure(errors="backslashreplace")


def _end(*_: object) -> NoReturn:
    """Ends the process at once: an extension module may turn KeyboardInterrupt into ImportError."""
    os.write(2, b"secateur: interrupted\n")
    os._exit(1)
