"""The command `secateur compare`."""

import click

from secateur.cli.group import Command
from secateur.cli.options import Server, server_options, tensors_option
from secateur.cli.output import Printer, print_options
from secateur.cli.pages import check_page, html_option
from secateur.cli.places import opened, source_of, standard_streams
from secateur.comparison import compare, labels_of


@click.command("compare", cls=Command)
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@tensors_option("default: every floating tensor")
@html_option
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(
    first: str,
    second: str,
    tensors: tuple[str, ...],
    html: str | None,
    printer: Printer,
    server: Server,
) -> None:
    """Shows two models side by side: sparsity, zeros, bytes and shapes of their tensors."""
    check_page(html)
    named, details = tensors or None, html is not None
    with standard_streams(first, None) as (path, _), opened(path, None, server) as (client, a):
        b = source_of(client, second, None)
        one, other = (client.report(of, named, printer.progress, details=details) for of in (a, b))
    found = compare(one, other, labels=labels_of(first, second))
    if html is not None:
        found.to_html(html)
    printer.answer(found)
