"""The command `secateur finalize`."""

from dataclasses import dataclass, replace
from pathlib import Path

import click

from secateur.cli.gains import smaller
from secateur.cli.group import Command
from secateur.cli.options import (
    Server,
    gathered,
    model_options,
    out_option,
    output_option,
    server_options,
    tensors_option,
)
from secateur.cli.output import Printer, print_options
from secateur.cli.places import opened, standard_streams
from secateur.cli.spec_options import groups_in, prior_option
from secateur.cli.targets import target_of
from secateur.forms import not_smaller
from secateur.grouping import Group
from secateur.literals import FinalOutput, Prior
from secateur.report import Report, ReportWarning


@dataclass(frozen=True)
class _Options:
    """What to finalize, and where the result is written."""

    model: str
    key: str | None
    out: str
    output: FinalOutput
    spec: str | None
    prior: Prior
    tensors: tuple[str, ...]


@click.command("finalize", cls=Command)
@gathered(
    _Options,
    "options",
    model_options,
    out_option("the file or folder to write"),
    output_option(("dense", "packed", "shrunk")),
    click.option(
        "--spec",
        metavar="FILE",
        type=click.Path(),
        help="with --output shrunk: a spec whose groups are cut: YAML or JSON",
    ),
    prior_option,
    tensors_option("default: all"),
)
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(options: _Options, printer: Printer, server: Server) -> None:
    """Makes pruning permanent: each pair of a weight and its mask becomes one tensor."""
    if (options.output == "shrunk") != (options.spec is not None):
        raise click.UsageError("--output shrunk and --spec FILE, with the groups, go together")
    printer = printer.beside(options.out)
    groups = [] if options.spec is None else groups_in(Path(options.spec))
    with standard_streams(options.model, options.out) as (model, out):
        report = _finalized(replace(options, model=model, out=out), groups, printer, server)
    note = not_smaller(options.output, report.zeros)
    if note:
        warning = ReportWarning("NOT_SMALLER", "note", (), note.removeprefix("note: "))
        report = replace(report, warnings=(*report.warnings, warning))
    printer.report(smaller(report, options.model, options.out), {})


def _finalized(options: _Options, groups: list[Group], printer: Printer, server: Server) -> Report:
    """Finalizes the model, and writes it to a path, or has it written to a URI."""
    target = target_of(options.out, options.model, options.output)
    with opened(options.model, options.key, server, options.out) as (client, source):
        target.check_holds(source, options.output)
        place, target = target.placed(options.model, source, options.output, not server.server)
        final = client.finalize(
            place,
            options.tensors or None,
            printer.progress,
            target.uri,
            output=options.output,
            groups=groups,
            prior=options.prior,
        )
        if target.path:
            final.save(target.path)
    return final.report
