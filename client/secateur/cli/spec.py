"""The command `secateur spec`: checks spec files, and prints their JSON Schema."""

import json

import click

from secateur.cli.group import Group
from secateur.cli.options import Server, model_options, server_options, tensors_option
from secateur.cli.output import Printer, print_options, say
from secateur.cli.places import opened, standard_streams
from secateur.cli.spec_options import file_maker, prior_option
from secateur.literals import Prior
from secateur.spec_files.checking import check_spec
from secateur.spec_files.schema import spec_schema


@click.group("spec", cls=Group, no_args_is_help=False)
def command() -> None:
    """Works on files of specs: check, schema."""


@command.command("check")
@click.argument("file", metavar="FILE", type=click.Path())
@model_options
@tensors_option("for rules that name none; default: floating tensors of 2 or more dimensions")
@prior_option
@print_options(has_rows=True)
@server_options("else an embedded server")
def _check(
    file: str,
    model: str,
    key: str | None,
    tensors: tuple[str, ...],
    prior: Prior,
    printer: Printer,
    server: Server,
) -> None:
    """Says what each rule of FILE matches in IN, and what a prune would do. Prunes nothing.

    Exits with 1 if the spec does not fit the model.
    """
    make = file_maker(file, tensors)
    with standard_streams(model, None) as (path, _), opened(path, key, server) as (client, source):
        found = check_spec(client, source, make(client, source), prior)
    printer.show(found.to_dict(), found.text())
    for problem in found.problems:
        say(problem)
    if found.problems:
        raise click.exceptions.Exit(1)


@command.command("schema")
@click.option("--json", is_flag=True, expose_value=False, help="as without it: a schema is JSON")
def _schema() -> None:
    """Prints the JSON Schema of spec files, for editors."""
    print(json.dumps(spec_schema(), indent=2))
