"""The command `secateur checkpoints`: lists, uploads, downloads and deletes checkpoints."""

from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from secateur.checkpoint import Checkpoint
from secateur.cli.group import Group
from secateur.cli.options import Server, model_options, out_option, output_option, server_options
from secateur.cli.output import Printer, print_options
from secateur.cli.places import client_of, source_of, standard_streams
from secateur.errors import DataLoss
from secateur.forms import FORMS
from secateur.literals import Form
from secateur.tables import Table
from secateur_proto.index import SUFFIX

_server_options = server_options("one is required")


@click.group("checkpoints", cls=Group, no_args_is_help=False)
def command() -> None:
    """Manages checkpoints on a server: ls, put, get, rm."""


@command.command("ls")
@print_options(has_rows=True)
@_server_options
def _ls(printer: Printer, server: Server) -> None:
    """Lists the checkpoints, the newest first."""
    with client_of(server) as client:
        found = list(client.checkpoints())
    head = ("name", "model", "created", "size", "masks", "expires")
    rows = [head, *map(_row, found)]
    printer.show([_plain(checkpoint) for checkpoint in found], Table(rows, left=len(head)))


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    expires = checkpoint.expire_time
    return (
        checkpoint.name,
        _model(checkpoint),
        _time(checkpoint.create_time),
        _size(checkpoint.size_bytes),
        _size(checkpoint.mask_bytes) if checkpoint.mask_bytes else "-",
        _time(expires) if expires else "never",
    )


def _model(checkpoint: Checkpoint) -> str:
    """The name of the model's file, or of the index of its shards."""
    names = [file.filename for file in checkpoint.files]
    return next((name for name in names if name.endswith(SUFFIX)), names[0]) or "-"


def _time(time: datetime) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as plain data, for JSON."""
    found = asdict(checkpoint)
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in found.items()}


def _size(count: float) -> str:
    """Bytes, rounded for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@command.command("put")
@model_options
@print_options()
@_server_options
def _put(model: str, key: str | None, printer: Printer, server: Server) -> None:
    """Uploads a model, and prints the name of its checkpoint.

    IN is a file, a folder, or a URI.
    """
    with standard_streams(model, None) as (path, _), client_of(server) as client:
        found = client.upload(source_of(client, path, key), printer.progress)
    if printer.json:
        printer.show(_plain(found), "")
    else:
        printer.always(found.name)


@command.command("get")
@click.argument("name")
@out_option("a file, or a folder")
@output_option([name for name in FORMS if name != "shrunk"])  # which needs groups
@print_options()
@_server_options
def _get(name: str, out: str, output: Form, printer: Printer, server: Server) -> None:
    """Downloads a checkpoint: NAME is checkpoints/..."""
    printer = printer.beside(out)
    with standard_streams("", out) as (_, path), client_of(server) as client:
        client.download(client.checkpoint(name), path, output, printer.progress)
    if printer.json:
        printer.show({"name": name, "out": out}, "")


@command.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@print_options()
@_server_options
def _rm(names: tuple[str, ...], printer: Printer, server: Server) -> None:
    """Deletes checkpoints: each NAME is checkpoints/..."""
    with client_of(server) as client:
        unique = list(dict.fromkeys(names))
        for name in unique:  # a wrong name must delete none of the others
            with suppress(DataLoss):  # damaged checkpoints may be deleted
                client.checkpoint(name)
        for name in unique:
            client.delete(name)
    if printer.json:
        printer.show({"deleted": unique}, "")
