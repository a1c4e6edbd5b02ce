"""The command secateur: prunes, reports, plans and finalizes files, and manages checkpoints."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from secateur import __version__
from secateur.cli.checkpoints import add_checkpoints
from secateur.cli.export import add_export
from secateur.cli.measure import add_plan, add_report, add_sensitivity
from secateur.cli.pack import add_pack
from secateur.cli.parser import Parser, parse
from secateur.cli.prune import add_finalize, add_prune
from secateur.cli.shrink import add_shrink
from secateur.errors import FewInputs, NotSaved, SecateurError

# Bytes of a file that torch prunes faster than numba's kernels are loaded, which takes 0.5 s.
SMALL_BYTES = 4 << 20


def main(arguments: Sequence[str] | None = None, owns_process: bool = False) -> int:
    """Runs the command.

    Args:
        arguments: The command line; None is that of the process.
        owns_process: Whether the process does nothing else, so that its environment may change.

    Returns:
        The exit status: 0, or 1 with a line on stderr. Wrong usage exits with 2.
    """
    try:
        options = parse(_parser(), arguments)
        if owns_process:
            _skip_kernels(options)
        with _warnings_in_lines():
            options.run(options)
        print(end="", flush=True)
    except SecateurError as error:
        return _failed(str(error))
    except BrokenPipeError:  # the reader of a pipe has closed it
        _drop_output()
        return 1
    except OSError as error:  # such as a full disk
        _drop_output()
        return _failed(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _failed("interrupted")
    return 0


def _failed(reason: str) -> int:
    print(f"secateur: {reason}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Discards standard output, and the content of its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Prints each warning of secateur as one line on stderr."""
    own = (NotSaved, FewInputs)
    with warnings.catch_warnings():
        for category in own:
            warnings.simplefilter("always", category)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *at: Any, **more: Any) -> None:
            if issubclass(category, own):
                print(f"secateur: warning: {message}", file=sys.stderr)
            else:
                others(message, category, *at, **more)

        warnings.showwarning = show
        yield


def run() -> NoReturn:
    """Runs the command, and ends the process without the interpreter's shutdown.

    During the shutdown, threads of gRPC and torch may still run, and sometimes abort the process: a
    successful command would fail.
    """
    status = main(owns_process=True)
    with suppress(OSError):  # the command reported it already
        print(end="", flush=True)
    os._exit(status)


def _skip_kernels(options: argparse.Namespace) -> None:
    """Lets an embedded server prune a small file with torch alone, which gives the same bits."""
    model = Path(getattr(options, "model", ""))
    with suppress(OSError, ValueError):  # the command reports a wrong path
        if not options.server and model.is_file() and model.stat().st_size <= SMALL_BYTES:
            os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="secateur",
        description="Prunes neural networks on a server, as torch.nn.utils.prune does.",
        epilog="IN and OUT are files (.safetensors; .pt, .pth, .bin, .ckpt or .tar of torch.save; "
        ".onnx), folders with one model, or URIs (file:///..., s3://...) that the server opens. IN "
        "may also be a checkpoint, as `secateur checkpoints ls` names it.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_prune(commands)
    add_report(commands)
    add_plan(commands)
    add_sensitivity(commands)
    add_finalize(commands)
    add_export(commands)
    add_pack(commands)
    add_shrink(commands)
    add_checkpoints(commands)
    return parser
