"""The command `secateur sensitivity`."""

import click

from secateur.cli.group import Command
from secateur.cli.options import (
    Server,
    amounts_option,
    model_options,
    server_options,
    tensors_option,
)
from secateur.cli.output import Printer, print_options
from secateur.cli.pages import check_page, html_option, title_of
from secateur.cli.places import opened, standard_streams
from secateur.defaults import SOME_AMOUNTS


@click.command("sensitivity", cls=Command)
@model_options
@tensors_option("default: every floating tensor of 2 or more dimensions")
@amounts_option("default: 0.1 to 0.9")
@html_option
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(
    model: str,
    key: str | None,
    tensors: tuple[str, ...],
    amounts: list[float] | None,
    html: str | None,
    printer: Printer,
    server: Server,
) -> None:
    """Shows how much of its norm each tensor would lose by many amounts."""
    check_page(html)
    with standard_streams(model, None) as (path, _), opened(path, key, server) as (client, source):
        sensitivity = client.sensitivity(
            source, tensors or None, amounts or SOME_AMOUNTS, progress=printer.progress
        )
    if html is not None:
        sensitivity.to_html(html, title=title_of("Sensitivity", model))
    printer.answer(sensitivity)
