"""How commands print: tables for people, JSON for programs, lines on stderr."""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TextIO

import click

from secateur.cli.options import Decorator, at_most_one, gathered
from secateur.report import Report
from secateur.tables import Table


def say(text: str) -> None:
    """Prints a line on stderr, in colour on a terminal."""
    kind = text.partition(": ")[0]
    name = click.style("secateur:", fg={"warning": "yellow", "note": "cyan"}.get(kind, "red"))
    click.echo(f"{name} {text}", err=True, color=None if has_colours() else False)


def has_colours() -> bool:
    """Whether a terminal may get colours: see https://no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Printed(Protocol):
    """An answer that is printed as a table or as JSON."""

    def table(self) -> Table: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Printer:
    """What a command prints; see `print_options`.

    Attributes:
        json: Whether to print JSON.
        quiet: Whether to print warnings and errors only.
        all: Whether a terminal gets every row of a long table.
        is_beside: Whether standard output has a model, so that text is printed on stderr.
    """

    json: bool
    quiet: bool
    all: bool = False
    is_beside: bool = False

    def __post_init__(self) -> None:
        at_most_one(json=self.json, quiet=self.quiet)

    @property
    def progress(self) -> bool | None:
        """Whether calls show their progress: None is on a terminal."""
        return False if self.quiet else None

    def beside(self, out: str | None) -> "Printer":
        """Returns how to print beside a model that is written to OUT.

        Raises:
            click.UsageError: JSON and the model would both be on standard output.
        """
        if out == "-" and self.json:
            raise click.UsageError("--json: not allowed with -o -, as stdout has the model")
        return replace(self, is_beside=out == "-")

    def answer(self, found: _Printed) -> None:
        """Prints an answer."""
        self.show(found.to_dict(), found.table())

    def report(self, report: Report, more: Mapping[str, Any]) -> None:
        """Prints the report of a command that writes a file; warnings are lines on stderr."""
        notes = []
        for warning in report.warnings:
            if warning.severity == "note":
                notes.append(warning)
            else:
                say(str(warning))
        self.show({**report.to_dict(), **more}, replace(report, warnings=tuple(notes)).table())

    def show(self, data: Any, text: Table | str) -> None:
        """Prints data as JSON, or else its text."""
        if self.json:
            print(json.dumps(_finite(data), indent=2, allow_nan=False))
        elif not self.quiet:
            self.always(text)

    def always(self, text: Table | str) -> None:
        """Prints text, quiet or not."""
        stream: TextIO = sys.stderr if self.is_beside else sys.stdout
        if isinstance(text, Table) and stream.isatty():
            from secateur.cli.terminal import print_table

            print_table(text, stream, self.all)
        else:
            click.echo(text, file=stream, color=None if has_colours() else False)


def _finite(data: Any) -> Any:
    """Returns data with strings in place of infinities and NaN, as in the JSON of protobuf."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


def print_options(has_rows: bool = False) -> Decorator[Any]:
    """Adds --json and --quiet, and --all if there is a table; the command gets a `Printer`."""
    options = [
        click.option("--json", is_flag=True, help="print JSON, not text"),
        click.option("--quiet", is_flag=True, help="print warnings and errors only"),
    ]
    if has_rows:
        text = "print every row of a long table, on a terminal too"
        options.append(click.option("--all", is_flag=True, help=text))
    return gathered(Printer, "printer", *options)
