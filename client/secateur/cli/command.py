"""The command secateur: COMMANDS has its commands, and `main` runs one."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click
from click.shell_completion import shell_complete

from secateur import __version__
from secateur.cli.group import LazyGroup
from secateur.cli.output import say
from secateur.errors import FewInputs, NotSaved, SecateurError

# A new command is a file of its name, with a click command named `command`, and a line here.
COMMANDS = {
    "prune": "decide what to prune, and prune it",
    "report": "show how sparse a model is, and where",
    "plan": "show what a prune by many amounts would do",
    "sensitivity": "show how much of its norm each tensor would lose by many amounts",
    "compare": "show two models side by side",
    "finalize": "make pruning permanent",
    "export": "write the model of a Hugging Face folder as ONNX, and check it",
    "pack": "write a model with zeros as a small file",
    "shrink": "write a smaller transformer to a new Hugging Face folder",
    "spec": "check a spec in a file with a model, or print the JSON Schema of such files",
    "checkpoints": "manage checkpoints on a server: ls, put, get, rm",
    "doctor": "check this installation and a server, with advice for what fails",
}

EPILOG = """IN and OUT are files (.safetensors; .pt, .pth, .bin, .ckpt or .tar of torch.save;
.onnx), folders with one model, or URIs (file:///..., s3://...) that the server opens. IN may also
be a checkpoint, as `secateur checkpoints ls` names it. - is a safetensors file on standard input
or output.

Exit status: 0 if the command did its work, 1 if it failed, 2 for wrong usage. The reason is one
line on standard error.
"""


@click.group(
    "secateur",
    cls=LazyGroup,
    helps=COMMANDS,
    epilog=EPILOG,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="secateur %(version)s")
def group() -> None:
    """Prunes neural networks on a server, as torch.nn.utils.prune does."""


def main(arguments: Sequence[str] | None = None, owns_process: bool = False) -> int:
    """Runs the command.

    Args:
        arguments: The command line; None is that of the process.
        owns_process: Whether the process does nothing else, so that its environment may change.

    Returns:
        The exit status: 0, or 1 with a line on stderr. Wrong usage exits with 2.
    """
    status = 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _warnings_in_lines(), group.make_context("secateur", given, obj=owns_process) as at:
            group.invoke(at)
        print(end="", flush=True)
    except click.exceptions.Exit as done:  # --help and --version
        status = done.exit_code
    except click.UsageError as error:
        say(f"error: {_usage(error)}")
        sys.exit(2)
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
    return status


def run() -> NoReturn:
    """Runs the command, or completes a command line for a shell, and ends the process.

    It skips the interpreter's shutdown: then threads of gRPC and torch may still run, and sometimes
    abort the process, so that a successful command would fail.
    """
    status = 0
    if asked := os.environ.get("_SECATEUR_COMPLETE"):
        status = shell_complete(group, {}, "secateur", "_SECATEUR_COMPLETE", asked)
    else:
        status = main(owns_process=True)
    with suppress(OSError):  # the command reported it already
        print(end="", flush=True)
    os._exit(status)


def _usage(error: click.UsageError) -> str:
    """A line on wrong usage: the option, what is wrong, and where to read on."""
    said = error.format_message().removesuffix(".")
    if isinstance(error, click.BadParameter) and error.param and error.message:
        said = f"{error.param.opts[-1]}: {error.message.removesuffix('.')}"
    path = error.ctx.command_path if error.ctx else "secateur"
    return " ".join(f"{said[:1].lower()}{said[1:]} (try {path} --help)".split())


def _failed(reason: str) -> int:
    say(reason)
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
                say(f"warning: {message}")
            else:
                others(message, category, *at, **more)

        warnings.showwarning = show
        yield
