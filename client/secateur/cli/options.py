"""The options that several commands share, and the types of their values."""

import argparse
import math
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from secateur.amounts import units_of
from secateur.checks import percentage
from secateur.forms import FORMS


def add_command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None], default: str
) -> argparse.ArgumentParser:
    """Adds a command with the options that name a server.

    Args:
        commands: What add_subparsers returned.
        name: The name of the command.
        text: What the command does.
        run: Runs the command.
        default: What happens without --server.
    """
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, wrong_usage=command.error)
    _server_options(command, default)
    return command


def add_model_command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Adds a command on one model, by a server or else an embedded one; see `add_command`."""
    command = add_command(commands, name, text, run, "else an embedded server")
    command.add_argument("model", metavar="IN", help="the model")
    key_option(command)
    return command


def _server_options(command: argparse.ArgumentParser, default: str) -> None:
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
        help="use TLS, and trust the authorities that this machine trusts",
    )
    command.add_argument(
        "--tls-ca",
        metavar="FILE",
        default=os.environ.get("SECATEUR_TLS_CA"),
        help="use TLS, and trust these authorities: PEM (default: $SECATEUR_TLS_CA)",
    )
    command.add_argument("--tls-cert", metavar="FILE", help="your certificate: PEM")
    command.add_argument("--tls-key", metavar="FILE", help="its private key: PEM")
    command.add_argument(
        "--insecure", action="store_true", help="send the token to another machine without TLS"
    )
    command.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="fail after this many seconds"
    )


def key_option(command: argparse.ArgumentParser) -> None:
    """Adds --key."""
    text = "place of the state_dict in a torch file, such as ema.model (default: the only one)"
    command.add_argument("--key", metavar="PATH", help=text)


def out_option(command: argparse.ArgumentParser, text: str, is_required: bool = True) -> None:
    """Adds --out."""
    command.add_argument("-o", "--out", metavar="OUT", required=is_required, help=text)


def output_option(command: argparse.ArgumentParser, forms: Collection[str] = FORMS.keys()) -> None:
    """Adds --output.

    Args:
        command: The command.
        forms: The names of the outputs that it can have.
    """
    contents = ", ".join(f"{FORMS[name].content} ({name})" for name in forms)
    command.add_argument(
        "--output",
        choices=forms,
        default="dense",
        help=f"content of OUT: {contents}; default: dense",
    )


def tensors_option(command: argparse.ArgumentParser, default: str) -> None:
    """Adds --tensors."""
    command.add_argument(
        "--tensors", metavar="GLOB", action="append", help=f"name or glob, may repeat; {default}"
    )


def amounts_option(command: argparse.ArgumentParser, default: str) -> None:
    """Adds --amounts."""
    command.add_argument(
        "--amounts", metavar="AMOUNT,...", type=_amounts, help=f"such as 0.1,0.5,90%%; {default}"
    )


def json_option(command: argparse.ArgumentParser) -> None:
    """Adds --json."""
    command.add_argument("--json", action="store_true", help="print JSON, not a table")


def shown_options(command: argparse.ArgumentParser) -> None:
    """Adds --json and --quiet to a command that writes a file."""
    shown = command.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the report as JSON, not a table")
    shown.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _amounts(text: str) -> list[float]:
    return [amount(part) for part in text.split(",")]


def amount(text: str) -> float:
    """Parses an amount: an int, a float, or a percentage.

    Raises:
        argparse.ArgumentTypeError: It is none of them.
    """
    try:
        value = _number(text)
        units_of("amount", value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount, such as 100 (an int is a number of units), 0.5 or 50% (a "
            "fraction in [0, 1])"
        ) from None
    return value


def _number(text: str) -> float:
    if (share := percentage(text)) is not None:
        return share
    with suppress(ValueError):
        return int(text)
    return float(text)
