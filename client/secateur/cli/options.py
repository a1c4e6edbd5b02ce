"""The options that several commands share, and the types of their values."""

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, TypeVar

import click

from secateur.amounts import units_of
from secateur.checks import percentage
from secateur.forms import FORMS

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def gathered(kind: type, name: str, *options: Decorator[Any]) -> Decorator[Any]:
    """Adds options to a command, which gets their values as one object.

    Args:
        kind: A dataclass with a field for each option; others have defaults.
        name: The command's argument.
        options: As click makes them.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **given: Any) -> None:
            names = [field.name for field in fields(kind) if field.name in given]
            values = {option: given.pop(option) for option in names}
            function(*args, **{name: kind(**values)}, **given)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def at_most_one(**given: Any) -> None:
    """Refuses two options of which only one may be given.

    Raises:
        click.UsageError: Several values are neither None nor False.
    """
    names = [option_name(name) for name, value in given.items() if value not in (None, False)]
    if len(names) > 1:
        raise click.UsageError(f"{names[1]}: not allowed with {names[0]}")


def option_name(name: str) -> str:
    """Returns the option of an argument's name."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Server:
    """The options that name a server; see `server_options`."""

    server: str | None = None
    token: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False
    timeout: float | None = None


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise click.BadParameter(f"{text!r} is not a number of seconds above 0")


def server_options(default: str) -> Decorator[Any]:
    """Adds the options that name a server; the command gets a `Server`.

    Args:
        default: What happens without --server.
    """
    return gathered(
        Server,
        "server",
        click.option(
            "--server",
            metavar="ADDRESS",
            envvar="SECATEUR_SERVER",
            help=f"HOST:PORT of a server (default: $SECATEUR_SERVER, {default})",
        ),
        click.option(
            "--token",
            envvar="SECATEUR_TOKEN",
            help="authenticates you to the server (default: $SECATEUR_TOKEN)",
        ),
        click.option(
            "--tls",
            is_flag=True,
            help="use TLS, and trust the authorities that this machine trusts",
        ),
        click.option(
            "--tls-ca",
            type=click.Path(),
            metavar="FILE",
            envvar="SECATEUR_TLS_CA",
            help="use TLS, and trust these authorities: PEM (default: $SECATEUR_TLS_CA)",
        ),
        click.option("--tls-cert", type=click.Path(), metavar="FILE", help="your certificate: PEM"),
        click.option("--tls-key", type=click.Path(), metavar="FILE", help="its private key: PEM"),
        click.option(
            "--insecure", is_flag=True, help="send the token to another machine without TLS"
        ),
        click.option(
            "--timeout", metavar="SECONDS", type=_seconds, help="fail after this many seconds"
        ),
    )


def model_options(function: Function) -> Function:
    """Adds IN, as `model`, and --key."""
    key = "place of the state_dict in a torch file, such as ema.model (default: the only one)"
    function = click.option("--key", metavar="PATH", help=key)(function)
    return click.argument("model", metavar="IN", type=click.Path())(function)


def out_option(text: str, is_required: bool = True) -> Decorator[Any]:
    """Adds --out."""
    path = click.Path()
    return click.option(
        "-o", "--out", type=path, metavar="OUT", required=is_required, help=f"{text}; - is stdout"
    )


def output_option(forms: Collection[str] = FORMS.keys()) -> Decorator[Any]:
    """Adds --output.

    Args:
        forms: The names of the outputs that the command can have.
    """
    contents = ", ".join(f"{FORMS[name].content} ({name})" for name in forms)
    return click.option(
        "--output",
        type=click.Choice(list(forms)),
        metavar="FORM",
        default="dense",
        help=f"content of OUT: {contents}; default: dense",
    )


def tensors_option(default: str) -> Decorator[Any]:
    """Adds --tensors."""
    text = f"name or glob, may repeat; {default}"
    return click.option("--tensors", metavar="GLOB", multiple=True, help=text)


def amounts_option(default: str) -> Decorator[Any]:
    """Adds --amounts."""
    text = f"such as 0.1,0.5,90%; {default}"
    return click.option("--amounts", metavar="AMOUNT,...", type=_amounts, help=text)


def _amounts(text: str) -> list[float]:
    return [amount(part) for part in text.split(",")]


def amount(text: str) -> float:
    """Parses an amount: an int, a float, or a percentage.

    Raises:
        click.BadParameter: It is none of them.
    """
    try:
        value = _number(text)
        units_of("amount", value)
    except ValueError:
        raise click.BadParameter(
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
