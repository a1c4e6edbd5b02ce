"""The command `secateur doctor`."""

from dataclasses import asdict

import click

from secateur.checkup import Check, checkup
from secateur.cli.group import Command
from secateur.cli.options import Server, server_options
from secateur.cli.output import Printer, print_options
from secateur.cli.places import tls_of
from secateur.errors import SecateurError

_SECONDS = 20.0
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor", cls=Command)
@print_options()
@server_options("else only this installation is checked")
def command(printer: Printer, server: Server) -> None:
    """Checks this installation and a server, with advice for what fails.

    The server is looked up, called and timed, and an embedded one is started. All takes at most 20
    seconds, or --timeout. Exit status 1: a check failed.
    """
    seconds = server.timeout or _SECONDS
    tls = tls_of(server)
    found: list[Check] = []
    for check in checkup(server.server, server.token, tls, server.insecure, seconds):
        found.append(check)
        if not printer.json and not (printer.quiet and check.status == "ok"):
            printer.always(_line(check))
    names = [check.name for check in found if check.status == "fail"]
    if printer.json:
        printer.show({"ok": not names, "checks": [asdict(check) for check in found]}, "")
    if names:
        raise SecateurError(f"{len(names)} of {len(found)} checks failed: {', '.join(names)}")


def _line(check: Check) -> str:
    status = click.style(f"{check.status:4}", fg=_COLOURS[check.status])
    advice = f": {check.advice}" if check.advice else ""
    return f"{status}  {check.name:10}  {check.found}{advice}"
