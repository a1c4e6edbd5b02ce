"""The command `secateur prune`."""

from dataclasses import dataclass, replace

import click

from secateur.cli.gains import say_of_packed_folder, smaller
from secateur.cli.group import Command
from secateur.cli.options import (
    Server,
    gathered,
    model_options,
    out_option,
    output_option,
    server_options,
)
from secateur.cli.output import Printer, print_options, say
from secateur.cli.places import opened, standard_streams
from secateur.cli.spec_options import Maker, SpecOptions, spec_options
from secateur.cli.targets import target_of
from secateur.errors import SecateurError
from secateur.forms import SMALLER, is_made_of_masks, is_model
from secateur.literals import Form, Output
from secateur.report import Report
from secateur.result import PruneResult


@dataclass(frozen=True)
class _Options:
    """What to prune, and where the result is written."""

    model: str
    key: str | None
    out: str | None
    keep: bool
    output: Form


@click.command("prune", cls=Command)
@gathered(
    _Options,
    "options",
    model_options,
    out_option("the file or folder to write; not needed with --keep", is_required=False),
    click.option("--keep", is_flag=True, help="keep the result on the server, as a checkpoint"),
    output_option(),
)
@spec_options()
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(options: _Options, spec: SpecOptions, printer: Printer, server: Server) -> None:
    """Decides what to prune, and prunes it."""
    if not options.keep and options.out is None:
        raise click.UsageError("-o/--out or --keep is required")
    if options.out is None and options.output != "dense":
        raise click.UsageError("--output is the content of OUT: give -o as well")
    printer, make = printer.beside(options.out), spec.maker()
    if options.keep and not server.server:
        raise SecateurError("--keep needs a lasting server: give --server, or set SECATEUR_SERVER")
    with standard_streams(options.model, options.out) as (model, out):
        result = _pruned(replace(options, model=model, out=out), make, spec, printer, server)
    kept = {"checkpoint": result.checkpoint.name} if result.checkpoint else {}
    report = result.report
    if options.output in SMALLER:  # the client may have made it of masks
        report = report.without("NOT_SMALLER")
    written = options.out if is_model(options.output) else None
    printer.report(smaller(report, options.model, written), kept)
    if not printer.quiet and _may_be_percent(spec.amount, report):
        say(
            f"note: --amount {spec.amount} is a number of units; for a share of them give "
            f"--amount {spec.amount}%"
        )
    if options.output == "packed" and not printer.quiet:
        say_of_packed_folder(options.out)
    if kept and not printer.json:
        printer.always(f"{'' if printer.quiet else 'kept as '}{kept['checkpoint']}")


def _may_be_percent(amount: float | None, report: Report) -> bool:
    """Whether a count prunes far less than the share in percent of that number would."""
    return isinstance(amount, int) and 10 <= amount <= 100 and report.sparsity < amount / 200


def _pruned(
    options: _Options, make: Maker, given: SpecOptions, printer: Printer, server: Server
) -> PruneResult:
    """Prunes the model, and writes it to a path, or has it written to a URI."""
    target = target_of(options.out, options.model, options.output)
    with opened(options.model, options.key, server, options.out) as (client, source):
        target.check_holds(source, options.output)
        spec = make(client, source)
        source = given.beside(source)
        place, target = target.placed(options.model, source, options.output, not server.server)
        masks_do = source.is_here and is_made_of_masks(options.output) and not spec.solvers
        is_sent = target.uri or (target.path and not masks_do)
        output: Output = options.output if is_sent else "masks"
        if options.out is None:
            output = "none"
        result = client.prune(
            place,
            spec,
            output,
            printer.progress,
            keep=options.keep,
            destination=target.uri,
            prior=given.prior,
        )
        if target.path:
            result.save(target.path, options.output)
    return result
