"""The command secateur checkpoints: lists, uploads, downloads and deletes checkpoints."""

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.cli.options import (
    add_command,
    json_option,
    key_option,
    out_option,
    output_option,
)
from secateur.cli.source import client_of, source_of
from secateur.errors import DataLoss
from secateur.forms import FORMS
from secateur.tables import text_table
from secateur_proto.index import SUFFIX

_NEEDED = "one is required"  # the default of --server


def add_checkpoints(commands: Any) -> None:
    """Adds the command, and its own commands."""
    text = "manage checkpoints on a server: ls, put, get, rm"
    checkpoints: argparse.ArgumentParser = commands.add_parser(
        "checkpoints", help=text, description=text
    )
    under = checkpoints.add_subparsers(required=True, metavar="COMMAND")
    ls = add_command(under, "ls", "list the checkpoints, the newest first", _ls, _NEEDED)
    json_option(ls)
    text = "upload a model, and print the name of its checkpoint"
    put = add_command(under, "put", text, _put, _NEEDED)
    put.add_argument("model", metavar="IN", help="a file, a folder, or a URI")
    key_option(put)
    get = add_command(under, "get", "download a checkpoint", _get, _NEEDED)
    get.add_argument("name", metavar="NAME", help="checkpoints/...")
    out_option(get, "a file, or a folder")
    output_option(get, [name for name in FORMS if name != "shrunk"])  # which needs groups
    rm = add_command(under, "rm", "delete checkpoints", _rm, _NEEDED)
    rm.add_argument("names", metavar="NAME", nargs="+", help="checkpoints/...")


def _ls(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        found = list(client.checkpoints())
    if options.json:
        print(json.dumps([asdict(checkpoint) for checkpoint in found], indent=2, default=_plain))
        return
    head = ("name", "model", "created", "size", "masks", "expires")
    print(text_table([head, *map(_row, found)], left=len(head)))


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


def _plain(time: datetime) -> str:
    return time.isoformat()


def _size(count: float) -> str:
    """Bytes, rounded for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _put(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        print(client.upload(source_of(client, options)).name)


def _get(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        client.download(client.checkpoint(options.name), options.out, options.output)


def _rm(options: argparse.Namespace) -> None:
    with client_of(options) as client:
        names = dict.fromkeys(options.names)
        for name in names:  # a wrong name must delete none of the others
            with suppress(DataLoss):  # damaged checkpoints may be deleted
                client.checkpoint(name)
        for name in names:
            client.delete(name)
