"""How commands print reports."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any, Protocol

from secateur.report import Report


def show(report: Report, options: argparse.Namespace, more: dict[str, Any]) -> None:
    """Prints the report of a command that writes a file; warnings are lines on stderr."""
    notes = []
    for warning in report.warnings:
        if warning.severity == "note":
            notes.append(warning)
        else:
            print(f"secateur: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.to_dict(), **more}, indent=2))
    elif not options.quiet:
        print(replace(report, warnings=tuple(notes)))


class _Printed(Protocol):
    """An answer that is printed as a table, its `str`, or as JSON."""

    def to_dict(self) -> dict[str, Any]: ...


def print_found(found: _Printed, options: argparse.Namespace) -> None:
    """Prints an answer."""
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
