"""The commands that print what a server measures: report, plan and sensitivity."""

import argparse
import sys
from typing import Any

from secateur.cli.options import add_model_command, amounts_option, json_option, tensors_option
from secateur.cli.printing import print_found
from secateur.cli.source import opened
from secateur.cli.spec import read_planned_spec, spec_of, spec_options


def add_report(commands: Any) -> None:
    """Adds the command report."""
    text = "show how sparse a model is, and where"
    report = add_model_command(commands, "report", text, _report)
    tensors_option(report, "default: every floating tensor")
    json_option(report)


def add_plan(commands: Any) -> None:
    """Adds the command plan."""
    plan = add_model_command(commands, "plan", "show what a prune by many amounts would do", _plan)
    spec_options(plan, "global_unstructured")
    amounts_option(plan, "default: --amount, that of the spec's last rule, or 0.1 to 0.9")
    json_option(plan)


def add_sensitivity(commands: Any) -> None:
    """Adds the command sensitivity."""
    text = "show how much of its norm each tensor would lose by many amounts"
    sensitivity = add_model_command(commands, "sensitivity", text, _sensitivity)
    tensors_option(sensitivity, "default: every floating tensor of 2 or more dimensions")
    amounts_option(sensitivity, "default: 0.1 to 0.9")
    json_option(sensitivity)


def _report(options: argparse.Namespace) -> None:
    with opened(options) as (client, source):
        report = client.report(source, options.tensors)
    print_found(report, options)
    if not report.tensors:
        print(
            f"secateur: warning: {options.model} has no floating-point tensors, and a report "
            "measures no others",
            file=sys.stderr,
        )


def _plan(options: argparse.Namespace) -> None:
    read_planned_spec(options)
    with opened(options) as (client, source):
        spec = spec_of(options, client, source)
        plan = client.plan(source, spec, options.amounts, prior=options.prior)
    print_found(plan, options)


def _sensitivity(options: argparse.Namespace) -> None:
    given = {} if options.amounts is None else {"amounts": options.amounts}
    with opened(options) as (client, source):
        sensitivity = client.sensitivity(source, options.tensors, **given)
    print_found(sensitivity, options)
