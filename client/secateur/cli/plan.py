"""The command `secateur plan`."""

import click

from secateur.cli.group import Command
from secateur.cli.options import Server, amounts_option, model_options, server_options
from secateur.cli.output import Printer, print_options
from secateur.cli.places import opened, standard_streams
from secateur.cli.spec_options import SpecOptions, planned, spec_options


@click.command("plan", cls=Command)
@model_options
@spec_options("global_unstructured")
@amounts_option("default: --amount, that of the spec's last rule, or 0.1 to 0.9")
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(
    model: str,
    key: str | None,
    spec: SpecOptions,
    amounts: list[float] | None,
    printer: Printer,
    server: Server,
) -> None:
    """Shows what a prune by many amounts would do."""
    spec, asked = planned(spec, amounts, "global_unstructured")
    make = spec.maker()
    with standard_streams(model, None) as (path, _), opened(path, key, server) as (client, source):
        made = make(client, source)
        plan = client.plan(source, made, asked, printer.progress, prior=spec.prior)
    printer.answer(plan)
