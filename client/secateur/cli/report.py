"""The command `secateur report`."""

import click

from secateur.cli.group import Command
from secateur.cli.options import Server, model_options, server_options, tensors_option
from secateur.cli.output import Printer, print_options, say
from secateur.cli.pages import check_page, html_option, title_of
from secateur.cli.places import opened, standard_streams


@click.command("report", cls=Command)
@model_options
@tensors_option("default: every floating tensor")
@html_option
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(
    model: str,
    key: str | None,
    tensors: tuple[str, ...],
    html: str | None,
    printer: Printer,
    server: Server,
) -> None:
    """Shows how sparse a model is, and where."""
    check_page(html)
    with standard_streams(model, None) as (path, _), opened(path, key, server) as (client, source):
        report = client.report(source, tensors or None, printer.progress, details=html is not None)
    if html is not None:
        report.to_html(html, title=title_of("Sparsity", model))
    printer.answer(report)
    if not report.tensors:
        say(
            f"warning: {model} has no floating-point tensors, and a report measures no others",
        )
