"""The command `secateur plan`."""

import click

from secateur.cli.group import Command
from secateur.cli.options import Server, amounts_option, model_options, server_options
from secateur.cli.output import Printer, print_options
from secateur.cli.pages import check_page, html_option, title_of
from secateur.cli.places import opened, standard_streams
from secateur.cli.spec_options import SpecOptions, planned, spec_options
from secateur.plan import is_amount


@click.command("plan", cls=Command)
@model_options
@spec_options("global_unstructured")
@amounts_option("default: --amount, that of the spec's last rule, or 0.1 to 0.9")
@html_option
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(
    model: str,
    key: str | None,
    spec: SpecOptions,
    amounts: list[float] | None,
    html: str | None,
    printer: Printer,
    server: Server,
) -> None:
    """Shows what a prune by many amounts would do."""
    check_page(html)
    given = spec.amount
    spec, asked = planned(spec, amounts, "global_unstructured")
    make = spec.maker()
    with standard_streams(model, None) as (path, _), opened(path, key, server) as (client, source):
        made = make(client, source)
        plan = client.plan(source, made, asked, printer.progress, prior=spec.prior)
    if html is not None:
        marked = given if any(is_amount(given, of.amount) for of in plan.amounts) else None
        plan.to_html(html, title_of("Plan", model), marked)
    printer.answer(plan)
